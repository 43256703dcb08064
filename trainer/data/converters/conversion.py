"""A conversion from raw files to records: read side by side, settle, write, account for every raw record."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.data.converters.base import PAPER, Converter, Options, Source
from trainer.data.converters.registry import get_converter
from trainer.data.converters.staging import (
    Reading,
    connect,
    merge_parts,
    read_source,
    rejected_rows,
    settle_duplicates,
    settle_shared_images,
)  # fmt: skip
from trainer.data.converters.writing import OutputFile, Writer
from trainer.errors import UserError
from trainer.files import refuse_pointers
from trainer.launching import die_with_parent, starting
from trainer.locks import holding

FORMAT = 1
AGREES = 0.02  # Table 1 gives thousands: 2 % of the smallest entry (18k) is more than the rounding


@dataclass(frozen=True)
class Manifest:
    """What a conversion did; ``manifest.json`` is this."""

    content: dict[str, Any]
    path: Path

    @property
    def outputs(self) -> dict[str, dict[str, Any]]:
        """What is said of each output file, by its name without the suffix."""
        return {entry["file"].removesuffix(".jsonl"): entry for entry in self.content["outputs"]}

    @property
    def rejected(self) -> dict[str, int]:
        """How many raw records were rejected, by kind."""
        return self.content["rejected"]

    @property
    def complete(self) -> bool:
        """Whether every raw file was read to its end."""
        return self.content["complete"]


def convert(
    name: str,
    source: Path,
    output: Path,
    options: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Converts a raw data set to record files in `output`, with ``manifest.json`` and ``rejected.jsonl``.

    Interrupted, the same call goes on where it was. Finished, it returns the manifest without doing anything again.

    Args:
        name: a name of the registry, e.g. ``vqav2``.
        source: the folder (or file) of the raw data.
        output: folder of this conversion alone.
        options: values by name, see :class:`Options`; they override the preset.
        preset: ``cotbal-paper`` for the processing of CoTBal section 4.1.
        workers: processes that read files, and threads that look at images. The result does not depend on it.
        overwrite: replace another conversion in `output`.
        progress: show a bar on stderr.

    Raises:
        UserError: an unknown name or option, raw files that are missing or in `output`, anything else in `output`, or
            another process at work there.
    """
    converter = get_converter(name)
    chosen = converter.options(options or {}, preset)
    if not source.exists():
        raise UserError(f"{source} does not exist; '{name}' needs {converter.files}")
    if chosen.image_root and not Path(chosen.image_root).is_dir():
        raise UserError(f"image_root {chosen.image_root} is not a folder")
    if (chosen.max_tokens is None) != (chosen.tokenizer is None):
        given, missing = ("max_tokens", "tokenizer") if chosen.max_tokens else ("tokenizer", "max_tokens")
        raise UserError(
            f"'{name}' has {given} but no {missing}; set tokenizer to a folder with tokenizer.json and max_tokens to a "
            "length, or max_tokens to null to keep long conversations whole"
        )
    whole = output.resolve()  # what is below it was written here, or would be written over
    sources = [found for found in converter.sources(source, chosen) if not found.path.resolve().is_relative_to(whole)]
    if not sources:
        raise UserError(f"{output} holds the raw data of '{name}'; records need a folder of their own")
    _splits_are_there(converter, [found.pool for found in sources], options or {}, chosen)
    refuse_pointers(path for found in sources for path in (found.path, *(side.path for side in found.sides)))
    conversion = _Conversion(converter, sources, source, output, chosen, preset, workers, progress)
    output.mkdir(parents=True, exist_ok=True)
    with holding(output / ".lock", f"another process is converting into {output}"):
        return conversion.run(overwrite)


def _splits_are_there(converter: Converter, pools: list[str], given: Mapping[str, Any], chosen: Options) -> None:
    """Whether each split that `given` asks a number of records of gets any; not known where a file has several."""
    parts = {part.name for pool in converter.pools(chosen, pools).values() for part in pool.parts}
    for split in ("train", "validation", "test"):
        if given.get(split) is not None and split not in parts and all(pools):
            raise UserError(
                f"option '{split}' has nothing to count: the raw data of '{converter.name}' has no such split; leave "
                f"it out, or add its file, of {converter.files}"
            )


class _Conversion:
    def __init__(
        self,
        converter: Converter,
        sources: list[Source],
        base: Path,
        output: Path,
        options: Options,
        preset: str | None,
        workers: int,
        progress: bool,
    ) -> None:
        self.converter, self.sources, self.output, self.options = converter, sources, output, options
        self.preset, self.workers, self.progress = preset, max(1, workers), progress
        self.base = base if base.is_dir() else base.parent
        self.staging = output / ".staging"
        self.manifest = output / "manifest.json"

    def run(self, overwrite: bool) -> Manifest:
        inputs = self._digests()
        key = {
            "format": FORMAT,
            "converter": self.converter.name,
            "preset": self.preset,
            "options": json.loads(json.dumps(asdict(self.options))),  # tuples as the file will have them
            "inputs": inputs,
        }
        fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        finished = self._finished(fingerprint, overwrite)
        if finished is not None:
            return finished
        self._prepare(fingerprint)
        parts = [self.staging / f"{number}.sqlite" for number in range(len(self.sources))]
        with closing(connect(self.staging / "main.sqlite")) as database:
            done = {number for (number,) in database.execute("SELECT file FROM progress WHERE finished")}
            self._read([number for number in range(len(parts)) if number not in done], parts)
            merge_parts(database, parts)
            settle_duplicates(database, self.converter)
            shared = settle_shared_images(database, self.options.shared_images == "drop")
            found = [pool for (pool,) in database.execute("SELECT DISTINCT pool FROM items ORDER BY pool")]
            names = list(dict.fromkeys([source.pool for source in self.sources if source.pool] + found))
            writer = Writer(database, self.output, self.options, self.workers)
            (total,) = database.execute("SELECT count(*) FROM items").fetchone()
            with tqdm(total=total, desc="write", unit="item", disable=not self.progress) as bar:
                outputs = writer.write(self.converter.pools(self.options, names), bar.update)
            rejected = OutputFile(self.output / "rejected.jsonl")
            for row in rejected_rows(database, [self._relative(source.path) for source in self.sources]):
                rejected.write(row)
            rejected.finish()
            content = key | {"fingerprint": fingerprint} | self._accounts(database, outputs, writer, shared)
        partial = self.manifest.with_name("manifest.json.partial")
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(self.manifest)
        shutil.rmtree(self.staging, ignore_errors=True)
        return Manifest(content, self.manifest)

    def _accounts(self, database: Any, outputs: list[dict[str, Any]], writer: Writer, shared: int) -> dict[str, Any]:
        progress = database.execute("SELECT file, consumed, items, damaged, notes FROM progress ORDER BY file")
        read: list[dict[str, Any]] = []
        notes: dict[str, int] = {}
        complete = True
        for file, consumed, items, damaged, text in progress:
            complete &= not damaged
            read.append({"file": self._relative(self.sources[file].path), "records": consumed, "items": items})
            for note, count in json.loads(text).items():
                notes[note] = notes.get(note, 0) + count
        if shared:
            notes["training questions about images of validation or test"] = shared
        kinds = dict(database.execute("SELECT kind, count(*) FROM rejected GROUP BY kind ORDER BY kind"))
        return {
            "complete": complete,
            "read": read,
            "outputs": outputs,
            "rejected": kinds,
            "not_drawn": dict(writer.not_drawn),
            "notes": notes,
            "images_checked": self.options.image_root is not None,
            "table_1": self._table_1(outputs),
        }

    def _table_1(self, outputs: list[dict[str, Any]]) -> dict[str, Any] | None:
        size = self.converter.paper_size
        if self.preset != PAPER or size is None or self.options.limit is not None:
            return None
        written = sum(entry["records"] for entry in outputs if entry["file"] == "train.jsonl")
        return {"paper": size, "written": written, "agrees": abs(written - size) <= AGREES * size}

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self.base)) if path.is_relative_to(self.base) else str(path)

    def _digests(self) -> list[dict[str, Any]]:
        paths = list(
            dict.fromkeys(
                path for source in self.sources for path in (source.path, *(side.path for side in source.sides))
            )
        )
        total = sum(path.stat().st_size for path in paths)
        rows = []
        with tqdm(total=total, desc="digest", unit="B", unit_scale=True, disable=not self.progress) as bar:
            for path in paths:
                digest = hashlib.sha256()
                with path.open("rb") as file:
                    while block := file.read(2**20):
                        digest.update(block)
                        bar.update(len(block))
                rows.append({"file": self._relative(path), "bytes": path.stat().st_size, "sha256": digest.hexdigest()})
        return rows

    def _finished(self, fingerprint: str, overwrite: bool) -> Manifest | None:
        there = sorted(self.output.glob("*.jsonl"))
        if not self.manifest.is_file():
            if there and not overwrite and not self.staging.exists():
                raise UserError(
                    f"{self.output} holds {', '.join(path.name for path in there)} of unknown origin; give another "
                    "folder, or --overwrite to replace what has the name of an output"
                )
            return None
        names = {"rejected.jsonl"}
        same = whole = False
        try:
            content = json.loads(self.manifest.read_text(encoding="utf-8"))
            names |= {entry["file"] for entry in content["outputs"]}
            same = content["fingerprint"] == fingerprint
            whole = all((self.output / entry["file"]).stat().st_size == entry["bytes"] for entry in content["outputs"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # damaged, or an output is gone
        if same and whole and not overwrite:
            return Manifest(content, self.manifest)
        if not same and not overwrite:
            raise UserError(
                f"{self.output} holds another conversion (other data, options or version); "
                "give another folder, or --overwrite to replace it"
            )
        for path in (*(path for path in there if path.name in names), self.manifest):
            path.unlink()
        return None

    def _prepare(self, fingerprint: str) -> None:
        mark = self.staging / "fingerprint"
        if not mark.is_file() or mark.read_text() != fingerprint:
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir(parents=True)
            mark.write_text(fingerprint)

    def _read(self, numbers: list[int], parts: list[Path]) -> None:
        work = [
            Reading(self.converter, self.sources[number], number, self.options, self.output, parts[number])
            for number in numbers
        ]
        sizes = {number: self.sources[number].path.stat().st_size for number in numbers}
        with tqdm(total=sum(sizes.values()), desc="read", unit="B", unit_scale=True, disable=not self.progress) as bar:
            if self.workers == 1 or len(work) < 2:
                before = 0
                for reading in work:
                    read_source(reading, lambda offset, start=before: bar.update(max(0, start + offset - bar.n)))
                    before += sizes[reading.number]
                    bar.update(before - bar.n)
                return
            context = multiprocessing.get_context("spawn")  # a fork would copy whatever threads the caller has
            others = multiprocessing.active_children()
            with ProcessPoolExecutor(min(self.workers, len(work)), context, die_with_parent, (os.getpid(),)) as pool:
                try:
                    with starting():
                        futures = {pool.submit(read_source, reading): reading.number for reading in work}
                    for future in as_completed(futures):
                        future.result()
                        bar.update(sizes[futures[future]])
                except BaseException:  # each would read its file to the end, and what is read is kept
                    for process in multiprocessing.active_children():
                        if process not in others:
                            process.terminate()
                    raise
