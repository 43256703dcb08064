"""From the staged items to the output files: dealing, merging, checking images, writing whole files or none."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

from trainer.data.converters.base import Item, Options, Part, Pool, conversation
from trainer.data.converters.images import ImageChecker
from trainer.data.converters.staging import FILE_SHIFT

_JSON = json.JSONEncoder(ensure_ascii=False)
_AHEAD = 512  # records whose images are looked at together


@dataclass
class OutputFile:
    """A file under another name until it is complete, with its digest and counts."""

    path: Path
    records: int = 0
    turns: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    _file: BinaryIO | None = None

    def write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            self._file = self._partial.open("wb")
        line = (_JSON.encode(row) + "\n").encode()
        self._file.write(line)
        self.digest.update(line)
        self.records += 1
        self.turns += sum(turn["from"] == "human" for turn in row.get("conversations", ()))

    def finish(self) -> dict[str, Any]:
        """Gives the file its name; returns what the manifest says of it."""
        if self._file is None:
            self._file = self._partial.open("wb")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self.path)
        return {
            "file": self.path.name,
            "records": self.records,
            "questions": self.turns,
            "bytes": self.path.stat().st_size,
            "sha256": self.digest.hexdigest(),
        }

    @property
    def _partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")


@dataclass(frozen=True)
class _Staged:
    """One record to be, with the items it is made of."""

    row: dict[str, Any]
    images: tuple[str, ...]
    members: tuple[tuple[int, str, str], ...]  # seq, id, place


class Writer:
    """Writes every pool of a conversion."""

    def __init__(self, database: sqlite3.Connection, output: Path, options: Options, threads: int) -> None:
        self.database, self.output, self.options = database, output, options
        self.checker = ImageChecker(Path(options.image_root), options.follow_links) if options.image_root else None
        self.threads = threads
        self.not_drawn: Counter[str] = Counter()
        database.execute("CREATE TABLE IF NOT EXISTS images (path TEXT PRIMARY KEY, kind TEXT, reason TEXT)")
        # Rejections of an earlier attempt at writing come again.
        database.execute("CREATE TABLE IF NOT EXISTS written_from (rejections INTEGER)")
        before = database.execute("SELECT rejections FROM written_from").fetchone()
        if before is None:
            last = database.execute("SELECT ifnull(max(rowid), 0) FROM rejected").fetchone()
            database.execute("INSERT INTO written_from VALUES (?)", last)
        else:
            database.execute("DELETE FROM rejected WHERE rowid > ?", before)
        database.commit()

    def write(self, pools: dict[str, Pool], on_progress: Any) -> list[dict[str, Any]]:
        """Writes the outputs of every pool and returns what the manifest says of them."""
        done: list[dict[str, Any]] = []
        for name, pool in pools.items():
            files = [OutputFile(self.output / f"{part.name}.jsonl") if part.name else None for part in pool.parts]
            current = 0
            for staged in self._checked(self._staged(name, pool), on_progress):
                while current < len(files) and _full(files[current], pool.parts[current]):
                    current += 1
                target = files[current] if current < len(files) else None
                if target is None:
                    self.not_drawn[name] += 1
                else:
                    target.write(staged.row)
            done += [file.finish() for file in files if file is not None]
        return done

    def _staged(self, name: str, pool: Pool) -> Iterator[_Staged]:
        drawn = pool.merge or len(pool.parts) > 1
        order = "group_order, grp, item_order, seq" if drawn else "seq"
        rows = self.database.cursor().execute(
            f"SELECT seq, id, grp, place, body FROM items WHERE pool = ? ORDER BY {order}", (name,)
        )
        for group, members in groupby(rows, lambda row: (row[2], None if row[2] is not None else row[0])):
            if group[0] is None:
                for seq, item_id, _, place, text in members:
                    body = json.loads(text)
                    yield _Staged({"id": item_id, **body}, _images(body), ((seq, item_id, place),))
            else:
                yield from self._merged(group[0], members)

    def _merged(self, group: str, members: Iterator[Any]) -> Iterator[_Staged]:
        """One conversation per `max_turns` questions of a group."""
        chunk = 0
        # A pathological group must not grow in memory either.
        while rows := list(islice(members, self.options.max_turns or 10_000)):
            chunk += 1
            bodies = [json.loads(text) for *_, text in rows]
            images = _images(bodies[0])
            turns = tuple((question, answer) for body in bodies for question, answer in body["conversations"])
            item = Item(group if chunk == 1 else f"{group}#{chunk}", turns, images)
            row: dict[str, Any] = {"id": item.id}
            if images:
                row["image"] = images[0] if len(images) == 1 else list(images)
            row["conversations"] = conversation(item, self.options.prompt, self.options.prompt_turns)
            yield _Staged(row, images, tuple((seq, item_id, place) for seq, item_id, _, place, _ in rows))

    def _checked(self, staged: Iterator[_Staged], on_progress: Any) -> Iterator[_Staged]:
        if self.checker is None:
            for number, record in enumerate(staged, 1):
                if number % _AHEAD == 0:
                    on_progress(_AHEAD)
                yield record
            return
        with ThreadPoolExecutor(self.threads) as pool:
            while batch := list(islice(staged, _AHEAD)):
                problems = self._problems(sorted({image for record in batch for image in record.images}), pool)
                for record in batch:
                    found = [problems[image] for image in record.images if problems[image]]
                    if found and found[0]:
                        self._reject(record, *found[0])
                    else:
                        yield record
                self.database.commit()
                on_progress(len(batch))

    def _problems(self, images: list[str], pool: ThreadPoolExecutor) -> dict[str, tuple[str, str] | None]:
        assert self.checker is not None
        known: dict[str, tuple[str, str] | None] = {}
        for image in images:
            row = self.database.execute("SELECT kind, reason FROM images WHERE path = ?", (image,)).fetchone()
            if row is not None:
                known[image] = (row[0], row[1]) if row[0] else None
        new = [image for image in images if image not in known]
        for image, problem in zip(new, pool.map(self.checker.problem, new), strict=True):
            known[image] = problem
            self.database.execute("INSERT INTO images VALUES (?, ?, ?)", (image, *(problem or (None, None))))
        return known

    def _reject(self, record: _Staged, kind: str, reason: str) -> None:
        self.database.executemany(
            "INSERT INTO rejected VALUES (?, ?, ?, ?, ?, ?)",
            ((seq, seq >> FILE_SHIFT, place, item_id, kind, reason) for seq, item_id, place in record.members),
        )


def _full(file: OutputFile | None, part: Part) -> bool:
    return file is not None and part.size is not None and file.records >= part.size


def _images(body: dict[str, Any]) -> tuple[str, ...]:
    image = body.get("image", ())
    return (image,) if isinstance(image, str) else tuple(image)
