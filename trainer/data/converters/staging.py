"""The database that a conversion works in: constant memory, and a place to continue after a kill.

Every raw file is read into a database of its own, so that files can be read side by side, and committed every few
thousand records together with how far reading had come. The parts are then merged in file order, which makes the
result the same for any number of workers.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from trainer.data.converters.base import Context, Converter, Item, Options, Rejected, Source, conversation
from trainer.data.raw_json import Damage, Element, elements
from trainer.data.records import IMAGE_PLACEHOLDER, RecordError, _parse
from trainer.locks import holding

BATCH = 2000  # raw records between commits

_SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
    seq INTEGER PRIMARY KEY, pool TEXT, id TEXT, grp TEXT, group_order INTEGER, item_order INTEGER,
    content BLOB, place TEXT, body TEXT
);
CREATE TABLE IF NOT EXISTS rejected (seq INTEGER, file INTEGER, place TEXT, id TEXT, kind TEXT, reason TEXT);
CREATE TABLE IF NOT EXISTS progress (
    file INTEGER PRIMARY KEY, consumed INTEGER, items INTEGER, finished INTEGER, damaged INTEGER, notes TEXT
);
CREATE TABLE IF NOT EXISTS sides (name TEXT, key TEXT, value TEXT, PRIMARY KEY (name, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS loaded (name TEXT PRIMARY KEY);
"""
_JSON = json.JSONEncoder(ensure_ascii=False)  # made once: dumps makes a new one for every call
FILE_SHIFT = 40  # seq = file << 40 | number of the item in its file


def connect(path: Path) -> sqlite3.Connection:
    """A database that is fast and not safe against power loss: a damaged one is only work done twice."""
    database = sqlite3.connect(path)
    database.executescript(
        "PRAGMA journal_mode=TRUNCATE; PRAGMA synchronous=OFF; PRAGMA temp_store=FILE; PRAGMA cache_size=-32768;"
    )
    database.executescript(_SCHEMA)
    return database


def order_of(seed: int, *names: str) -> int:
    """A place in a random order that depends on the seed and the names only, so that it needs no memory."""
    digest = hashlib.blake2b("\0".join((str(seed), *names)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


@dataclass(frozen=True)
class Reading:
    """One raw file to read, for a worker process."""

    converter: Converter
    source: Source
    number: int
    options: Options
    output: Path
    database: Path


def read_source(work: Reading, on_progress: Any = None) -> None:
    """Reads a raw file into its part database, from where an earlier attempt stopped.

    Raises:
        UserError: a worker process that has outlived an earlier attempt is still at it.
    """
    busy = f"a process of an earlier conversion still reads {work.source.path}"
    with holding(work.database.with_suffix(".lock"), busy), closing(connect(work.database)) as database:
        _Reader(work, database).run(on_progress)


class _Reader:
    def __init__(self, work: Reading, database: sqlite3.Connection) -> None:
        self.work, self.database = work, database
        self.merging: dict[str, bool] = {}
        self.context = Context(work.source, work.options, work.output, self._lookup)
        self.consumed = self.count = self.damaged = 0

    def run(self, on_progress: Any) -> None:
        row = self.database.execute("SELECT consumed, items, finished, damaged, notes FROM progress").fetchone()
        if row is not None:
            self.consumed, self.count, finished, self.damaged, notes = row
            self.context.notes = Counter(json.loads(notes))
            if finished:
                return
        self._load_sides()
        limit = self.work.options.limit
        for position, element in enumerate(self.work.converter.read(self.work.source)):
            if limit is not None and position >= limit:
                break
            if position < self.consumed:
                continue
            self._take(element)
            self.consumed = position + 1
            if self.consumed % BATCH == 0:
                self._commit(0)
                if on_progress:
                    on_progress(element.offset)
        self._commit(1)

    def _commit(self, finished: int) -> None:
        self.database.execute(
            "INSERT OR REPLACE INTO progress VALUES (?, ?, ?, ?, ?, ?)",
            (self.work.number, self.consumed, self.count, finished, self.damaged, json.dumps(self.context.notes)),
        )
        self.database.commit()

    def _take(self, element: Element) -> None:
        raw_id = element.key
        try:
            if isinstance(element.value, Damage):
                self.damaged += element.value.ends
                raise Rejected("damaged", element.value.reason)
            items = self.work.converter.items(element, self.context)
            for item in items:
                raw_id = item.id
                self._keep(item, element.where)
        except Rejected as error:
            self._reject(element.where, raw_id, error.kind, str(error))

    def _keep(self, item: Item, place: str) -> None:
        options, pool = self.work.options, item.pool or self.work.source.pool
        spelt = not item.placed and IMAGE_PLACEHOLDER in "".join((item.system, *chain(*item.turns)))
        if pool not in self.merging:
            self.merging[pool] = self.work.converter.pools(options, [pool])[pool].merge
        turns = conversation(item, options.prompt, options.prompt_turns)
        body: dict[str, Any] = {"image": item.images[0] if len(item.images) == 1 else list(item.images)}
        body = (body if item.images else {"images": []} if spelt else {}) | {"conversations": turns}
        if item.references:
            body["references"] = list(item.references)
        try:
            _parse({"id": item.id, **body}, place, answered=bool(item.turns[-1][1]))
            grouped = self.merging[pool] and item.group is not None
            if grouped:
                body["conversations"] = [list(turn) for turn in item.turns]
            text = _JSON.encode(body)
            (item.group or "").encode()
        except (RecordError, UnicodeEncodeError) as error:
            raise Rejected("malformed", str(error).removeprefix(f"{place} (id '{item.id}'): ")) from error
        order = order_of(options.seed, pool, item.id)
        self.count += 1
        self.database.execute(
            "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self._seq, pool, item.id, item.group if grouped else None,
                order_of(options.seed, pool, "group", item.group or "") if grouped else order,
                order, hashlib.blake2b(text.encode(), digest_size=16).digest(), _clean(place), text,
            ),
        )  # fmt: skip

    def _reject(self, place: str, raw_id: str | None, kind: str, reason: str) -> None:
        self.database.execute(
            "INSERT INTO rejected VALUES (?, ?, ?, ?, ?, ?)",
            (self._seq, self.work.number, _clean(place), _clean(raw_id), kind, _clean(reason)),
        )

    @property
    def _seq(self) -> int:
        """Where the latest item stands among those of all files."""
        return self.work.number << FILE_SHIFT | self.count

    def _load_sides(self) -> None:
        done = {name for (name,) in self.database.execute("SELECT name FROM loaded")}
        for side in self.work.source.sides:
            if side.name in done:
                continue
            for element in elements(side.path, side.container, side.member):
                place = f"{side.path.name}: {element.where}"
                try:
                    if isinstance(element.value, Damage):
                        self.damaged += element.value.ends
                        raise Rejected("damaged", element.value.reason)
                    for key, value in self.work.converter.side_rows(side, element.value):
                        _encodable(key)
                        inserted = self.database.execute(
                            "INSERT OR IGNORE INTO sides VALUES (?, ?, ?)", (side.name, key, json.dumps(value))
                        )
                        if not inserted.rowcount:
                            raise Rejected("duplicate id", f"'{key}' is in the file twice; the first one is used")
                except Rejected as error:
                    self._reject(place, None, error.kind, str(error))
            self.database.execute("INSERT INTO loaded VALUES (?)", (side.name,))
            self._commit(0)

    def _lookup(self, name: str, key: str) -> Any:
        _encodable(key)
        row = self.database.execute("SELECT value FROM sides WHERE name = ? AND key = ?", (name, key)).fetchone()
        if row is None:
            raise Rejected("no partner", f"there is no {name} for '{key}'")
        return json.loads(row[0])


def _clean(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def _encodable(key: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise Rejected("malformed", f"{key!r} is not valid Unicode") from error


def merge_parts(database: sqlite3.Connection, parts: list[Path]) -> None:
    """Adds part databases to the main one in order and deletes them; what is in already is left alone."""
    done = {number for (number,) in database.execute("SELECT file FROM progress WHERE finished")}
    for number, part in enumerate(parts):
        if number not in done:
            database.execute("ATTACH ? AS part", (str(part),))
            for table in ("items", "rejected", "progress"):
                database.execute(f"INSERT INTO main.{table} SELECT * FROM part.{table}")
            database.commit()
            database.execute("DETACH part")
        part.unlink(missing_ok=True)


def settle_duplicates(database: sqlite3.Connection, converter: Converter) -> None:
    """Rejects items that repeat another, or renames them where the published data itself repeats ids."""
    database.execute("CREATE INDEX IF NOT EXISTS by_id ON items (id, seq)")
    first = "(SELECT o.{0} FROM items o WHERE o.{1} = i.{1} AND o.seq < i.seq ORDER BY o.seq LIMIT 1)"
    if converter.unique_content:
        database.execute("CREATE INDEX IF NOT EXISTS by_content ON items (content, seq)")
        _drop(database, first.format("id", "content"), "duplicate content", "says the same as '")
    if converter.rename_duplicates:
        same = "(SELECT o.id FROM items o WHERE o.id = i.id AND o.content = i.content AND o.seq < i.seq LIMIT 1)"
        _drop(database, same, "duplicate content", "repeats the record with id '")
        repeated = "SELECT i.seq FROM items i WHERE EXISTS (SELECT 1 FROM items o WHERE o.id = i.id AND o.seq < i.seq)"
        rows = [seq for (seq,) in database.execute(repeated)]
        mask = (1 << FILE_SHIFT) - 1
        database.executemany(
            "UPDATE items SET id = id || ? WHERE seq = ?",
            ((f"#{seq >> FILE_SHIFT}.{seq & mask}", seq) for seq in rows),
        )
    _drop(database, first.format("id", "id"), "duplicate id", "the id is already used: '")
    database.commit()


def settle_shared_images(database: sqlite3.Connection, drop: bool) -> int:
    """Counts the training items about an image that another pool has too; with `drop` they are rejected instead."""
    database.execute("CREATE TEMP TABLE held_out (image TEXT PRIMARY KEY)")
    database.execute(
        "INSERT OR IGNORE INTO held_out SELECT json_extract(body, '$.image') FROM items "
        "WHERE pool <> 'train' AND json_extract(body, '$.image') IS NOT NULL"
    )
    shared = "(SELECT image FROM held_out WHERE i.pool = 'train' AND image = json_extract(i.body, '$.image'))"
    if drop:
        _drop(database, shared, "shared image", "validation or test has the image too: '")
        database.commit()
        return 0
    (count,) = database.execute(f"SELECT count(*) FROM items i WHERE {shared} IS NOT NULL").fetchone()
    return int(count)


def _drop(database: sqlite3.Connection, partner: str, kind: str, reason: str) -> None:
    """Moves every item that has a `partner` (an SQL expression over ``items i``) to the rejected ones."""
    database.execute("DROP TABLE IF EXISTS temp.repeated")
    database.execute(
        f"CREATE TEMP TABLE repeated AS SELECT i.seq AS seq, {partner} AS partner FROM items i "
        f"WHERE {partner} IS NOT NULL"
    )
    database.execute(
        "INSERT INTO rejected SELECT i.seq, i.seq >> ?, i.place, i.id, ?, ? || r.partner || '''' "
        "FROM temp.repeated r JOIN items i ON i.seq = r.seq",
        (FILE_SHIFT, kind, reason),
    )
    database.execute("DELETE FROM items WHERE seq IN (SELECT seq FROM temp.repeated)")


def rejected_rows(database: sqlite3.Connection, files: list[str]) -> Iterator[dict[str, Any]]:
    """What ``rejected.jsonl`` holds, in file order."""
    for file, place, raw_id, kind, reason in database.execute(
        "SELECT file, place, id, kind, reason FROM rejected ORDER BY file, seq, rowid"
    ):
        yield {"file": files[file], "position": place, "id": raw_id, "kind": kind, "reason": reason}
