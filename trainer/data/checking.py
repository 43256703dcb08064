"""A look at record files before training: schema, ids, images, lengths in tokens, supervised tokens, steps.

Files are streamed: memory holds a few hundred records, the hashes of the ids and the lengths.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.bars import watched
from trainer.data.mixtures import optimizer_steps
from trainer.data.oddities import oddities
from trainer.data.raw_json import Damage, elements
from trainer.data.records import Record, RecordError, _parse
from trainer.errors import UserError, one_of
from trainer.files import refuse_pointers
from trainer.tasks import ImageLook, look_at_image

if TYPE_CHECKING:
    from trainer.data.encoding import ConversationEncoder

_SHOWN = 20  # problems in the table; the rest is counted
_AHEAD = 512  # records whose images are looked at together
Found = tuple[str, Record | RecordError]  # where it stands, and what is there


@dataclass
class FileCheck:
    """What was found in one file. ``lengths`` are tokens of each record before cutting at ``max_length``."""

    path: Path
    records: int = 0
    questions: int = 0
    images: int = 0
    problems: int = 0
    warnings: int = 0
    supervised: int = 0
    cut: int = 0
    lengths: array[int] = field(default_factory=lambda: array("q"))


@dataclass
class CheckResult:
    """All files, and the first problems and warnings by name."""

    files: list[FileCheck]
    shown: list[str]
    warned: dict[tuple[Path, str], str]  # by file and kind
    batch_size: int
    epochs: float
    counted: bool
    alike: Counter[tuple[Path, str]] = field(default_factory=Counter)  # warnings that each of them stands for

    def warn(self, file: FileCheck, kind: str, warning: str) -> None:
        """Adds a warning; of a kind in a file the first is named, for files may be full of them."""
        file.warnings += 1
        key = file.path, kind
        if key in self.warned or len(self.warned) < _SHOWN:
            self.warned.setdefault(key, warning)
            self.alike[key] += 1

    @property
    def problems(self) -> int:
        return sum(file.problems for file in self.files)

    @property
    def steps(self) -> int:
        """Optimizer steps of a training on all files."""
        return optimizer_steps(sum(file.records for file in self.files), self.batch_size, self.epochs)

    def table(self) -> str:
        """Lines to print."""
        names = [str(file.path) for file in self.files]
        width = max(len(name) for name in [*names, "file"]) + 1
        head = f"{'file':<{width}}{'records':>10}{'questions':>11}{'images':>9}{'problems':>10}{'warnings':>10}"
        if self.counted:
            head += f"{'tokens':>14}{'median':>8}{'longest':>9}{'cut':>7}{'supervised':>12}"
        lines = [head]
        for name, file in zip(names, self.files, strict=True):
            line = f"{name:<{width}}{file.records:>10,}{file.questions:>11,}{file.images:>9,}{file.problems:>10,}"
            line += f"{file.warnings:>10,}"
            if self.counted:
                ordered = sorted(file.lengths)
                middle, longest = (ordered[len(ordered) // 2], ordered[-1]) if ordered else (0, 0)
                line += f"{sum(ordered):>14,}{middle:>8,}{longest:>9,}{file.cut:>7,}{file.supervised:>12,}"
            lines.append(line)
        lines.append(f"steps: {self.steps:,} ({self.epochs:g} epoch(s) of batches of {self.batch_size})")
        lines += self.shown
        if self.problems > len(self.shown):
            lines.append(f"... and {self.problems - len(self.shown):,} more")
        lines += [f"warning: {one_of(warning, self.alike[key])}" for key, warning in self.warned.items()]
        others = sum(file.warnings for file in self.files) - self.alike.total()
        if others:
            lines.append(f"... and {others:,} more warnings")
        return "\n".join(lines)


def check_files(
    paths: Sequence[Path],
    image_root: Path | None = None,
    tokenizer: Path | None = None,
    max_length: int = 2048,
    batch_size: int = 128,
    epochs: float = 1.0,
) -> CheckResult:
    """Checks record files; a task is a file.

    Args:
        paths: ``.json`` lists or ``.jsonl`` files of records.
        image_root: decode every image below it, once each; None leaves images alone.
        tokenizer: a model folder; its chat template and processor count tokens exactly as training does. Models that
            tile images need `image_root` for that: without it every image counts as a small one.
        max_length: longest sample in tokens.
        batch_size: records per optimizer step, over all devices.
        epochs: passes over the records.

    Raises:
        UserError: a file or folder is missing, or the tokenizer cannot be used.
    """
    counter = _counter(tokenizer) if tokenizer else None
    chat = counter.chat if counter else None
    looks: dict[str, ImageLook] = {}
    result = CheckResult([], [], {}, batch_size, epochs, counter is not None)
    for path in paths:
        if not path.is_file():
            raise UserError(f"record file {path} does not exist")
        refuse_pointers([path])
        file = FileCheck(path)
        result.files.append(file)
        seen: set[bytes] = set()  # digests of ids and of whole records
        found = _records(path)
        found = _with_looks(found, image_root, looks) if image_root else found
        odd_images: set[str] = set()
        for where, record in watched(found, path.name, "record"):
            try:
                if isinstance(record, RecordError):
                    raise record
                own_id, whole = (
                    hashlib.blake2b(text.encode(), digest_size=12).digest() for text in (record.id, repr(record))
                )
                again = "all of it is the same as in an earlier record" if whole in seen else ""
                if not again and own_id in seen:
                    again = "its id is already used in this file"
                seen |= {own_id, whole}
                seen_images = {image: looks[image] for image in record.images if image in looks}
                problem = next((look.problem for look in seen_images.values() if look.problem), None)
                if problem is not None:
                    raise RecordError(f"{where} (id '{record.id}'): {problem}")
                if counter is not None:
                    tokens, supervised, cut = _count(counter, record, max_length, image_root or Path())
                    file.lengths.append(tokens)
                    file.supervised += supervised
                    file.cut += cut
            except UserError as error:
                file.problems += 1
                if len(result.shown) < _SHOWN:
                    text = str(error)
                    result.shown.append(text if text.startswith(str(path)) else f"{where}: {text}")
                continue
            file.records += 1
            file.questions += len(record.turns)
            file.images += len(record.images)
            new = {image: look.warning for image, look in seen_images.items() if image not in odd_images}
            odd_images |= {image for image, warning in new.items() if warning}
            used = {again: f"{again}: it can be trained on, not scored"} if again else {}
            odd = {image: warning for image, warning in new.items() if warning}
            for kind, warning in (used | odd | oddities(record, chat)).items():
                result.warn(file, kind, f"{where} (id '{record.id}'): {warning}")
        if not file.records and not file.problems:
            file.problems = 1
            result.shown.append(f"{path} has no records")
    return result


def _records(path: Path) -> Iterator[Found]:
    for element in elements(path, "lines" if path.suffix == ".jsonl" else "list"):
        where = f"{path}, {element.where}"
        if isinstance(element.value, Damage):
            yield where, RecordError(f"{where}: {element.value.reason}")
            continue
        try:
            record = _parse(element.value, where)
        except RecordError as error:
            yield where, error
        else:
            yield where, record


def _with_looks(found: Iterator[Found], root: Path, looks: dict[str, ImageLook]) -> Iterator[Found]:
    """Hands `found` on, each record once `looks` has its images."""
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        while ahead := list(islice(found, _AHEAD)):
            images = {image for _, record in ahead if isinstance(record, Record) for image in record.images}
            new = sorted(images - looks.keys())
            looks.update(zip(new, pool.map(partial(look_at_image, root), new), strict=True))
            yield from ahead


def _counter(folder: Path) -> ConversationEncoder:
    """Lays out whole records as training does, without decoding their images."""
    from trainer.data.lengths import token_counter
    from trainer.models.loading import load_processor

    if not folder.is_dir():
        raise UserError(f"tokenizer folder {folder} does not exist")
    processor: Any = load_processor(str(folder))
    return token_counter(processor, 2**40)  # the whole length is wanted; what training keeps is counted from the labels


def _count(counter: ConversationEncoder, record: Record, max_length: int, image_root: Path) -> tuple[int, int, bool]:
    """Tokens and supervised tokens of a record, and whether it is cut."""
    encoded = counter.training_sample(record, lambda image: image_root / image)
    supervised = sum(label >= 0 for label in encoded.labels[1:max_length])
    if not supervised:
        raise UserError(f"record '{record.id}': no supervised token within {max_length} tokens")
    return len(encoded.input_ids), supervised, len(encoded.input_ids) > max_length
