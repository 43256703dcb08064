"""Records: the LLaVA conversation format, read strictly.

One record is ``{"id", "image"?, "conversations": [{"from": "human"|"gpt", "value"}, ...], "references"?}`` in a
JSON list or a JSONL file (Liu et al., "Visual Instruction Tuning", 2023). ``image`` (or ``images``) is a path relative
to the task's image root, or a list of them; ``<image>`` in the human turns says where they go, and is text like any
other where ``images`` is an empty list. Only "gpt" turns are supervised. A first turn from "system" is the system
message. ``references`` lists further correct answers for scoring. ``task`` is looked at where the records of a file
name several.
"""

from __future__ import annotations

import json
import marshal
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from trainer.data.raw_json import Damage, elements
from trainer.errors import UserError, first, listed
from trainer.files import refuse_pointers, write_whole

IMAGE_PLACEHOLDER = "<image>"
_MESSAGES = "`cotbal convert messages` makes records, which have 'conversations', of other chats and instructions"
# Where other exports have their images: passed over, they would train a model blind. And what they put before a chat.
_NOT_READ = {
    **dict.fromkeys(
        ("image_path", "image_paths", "image_file", "img", "imgs", "picture", "pictures"), "did you mean 'image'?"
    ),
    **dict.fromkeys(("video", "videos"), "videos are not supported"),
    "system": "a system message is a first turn {'from': 'system', 'value': text}",
    "tools": "descriptions of tools go into the system message, a first turn {'from': 'system', 'value': text}",
    "messages": _MESSAGES,
}
_SPELT = "give the record 'images': []"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class RecordError(UserError):
    """A record that cannot be used: names the file, the position in it, the id and what is wrong."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A question (what the model reads) and the answer it is supervised on."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation about at most a few images; without any, ``<image>`` in its texts is text."""

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    references: tuple[str, ...]
    system: str = ""

    @property
    def answers(self) -> list[str]:
        """Correct answers of a one-question record, for scoring."""
        return list(self.references) or [self.turns[-1].answer]


class Records(Sequence[Record]):
    """Records in memory: as bytes in one piece, of which a record is made anew each time that it is asked for.

    As Python objects they take three times as much, in every process of a training. Those that encode samples would
    come to copy the objects page by page, as they count references to them. Equal to any sequence of equal records.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._content = bytearray()
        self._starts, self._ends = array("q"), array("q")
        for record in records:
            self.append(record)

    def append(self, record: Record) -> None:
        """Adds a record at the end."""
        texts = [text for turn in record.turns for text in (turn.question, turn.answer)]
        self._starts.append(len(self._content))
        self._content += marshal.dumps((record.id, record.images, texts, record.references, record.system))
        self._ends.append(len(self._content))

    def only(self, places: Sequence[int]) -> Records:
        """Some of the records, in this order, in the same memory."""
        chosen = Records()
        chosen._content = self._content
        chosen._starts, chosen._ends = (array("q", [ends[k] for k in places]) for ends in (self._starts, self._ends))
        return chosen

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        places = range(len(self))[index]
        return [self._read(place) for place in places] if isinstance(places, range) else self._read(places)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # it grows

    def _read(self, place: int) -> Record:
        with memoryview(self._content) as content:  # a slice of it copies nothing
            name, images, texts, references, system = marshal.loads(content[self._starts[place] : self._ends[place]])
        turns = tuple(map(Turn, texts[::2], texts[1::2]))
        return Record(name, images, turns, references, system)


def read_records(path: Path, answered: bool = True, task: str = "") -> Records:
    """Reads every record of a ``.json`` list or a ``.jsonl`` file, in file order.

    Args:
        answered: the last question of every record has its answer, without which nothing can be trained or scored. If
            False it may be missing, as in test sets whose answers are kept secret; it is empty then.
        task: as in :meth:`RecordFile.of_task`.

    Raises:
        RecordError: the file is missing, is not JSON, or records are malformed or repeat an id, a line for each.
    """
    records, problems = read_file(path, answered).of_task(task, unique_ids=True)
    if problems:
        raise RecordError("\n".join(first(problems)))
    return records


@dataclass(frozen=True)
class RecordFile:
    """What is in a file, whose name is ``path``.

    Attributes:
        records: that can be used, in file order.
        places: of each, where it stands.
        tasks: of each, the name in ``task``.
        problems: what is wrong with the other records.
    """

    path: Path
    records: Records
    places: Sequence[str]
    tasks: Sequence[str | None]
    problems: Sequence[str]

    def of_task(self, task: str, unique_ids: bool) -> tuple[Records, list[str]]:
        """The records of a task, and what is wrong with others of the file.

        Args:
            task: of a file whose records name several tasks in ``task``, those of this one, and none may be without;
                of another file, all. Empty is all.
            unique_ids: no two records have the same id, as scoring needs. If False they may, as in LLaVA's own files.
        """
        problems = list(self.problems)
        names = {name for name in self.tasks if name is not None}
        chosen: Sequence[int] = range(len(self.records))
        if task and len(names) > 1:
            if nameless := [where for where, name in zip(self.places, self.tasks, strict=True) if name is None]:
                problems.append(
                    f"{nameless[0]}: no 'task', as {len(nameless):,} in all, and others name {listed(sorted(names))}: "
                    "no task would get them; give each its task, or take 'task' out of all"
                )
            chosen = [index for index, name in enumerate(self.tasks) if name == task]
            if not chosen:
                problems.append(
                    f"{self.path}: its records name the tasks {listed(sorted(names))} in 'task', and none '{task}'; "
                    "name the task as they do, or take 'task' out of them"
                )
        if unique_ids:
            seen: dict[str, int] = {}
            for index in chosen:
                before = seen.setdefault(name := self.records[index].id, index)
                if before != index:
                    problems.append(
                        f"{self.places[index]}: id '{name}' is already used by {self.places[before]}; "
                        "ids must be unique"
                    )
            chosen = list(seen.values())
        return self.records if len(chosen) == len(self.records) else self.records.only(chosen), problems


def read_file(path: Path, answered: bool = True) -> RecordFile:
    """Reads a ``.json`` list or a ``.jsonl`` file, whatever is wrong with some records.

    Args:
        answered: as in :func:`read_records`.

    Raises:
        RecordError: the file is missing, or is not a JSON list.
    """
    records, places, tasks = Records(), [], []
    problems: list[str] = []
    for where, raw in _raw_records(path):
        try:
            value = _loads(raw, where) if isinstance(raw, bytes) else raw
            records.append(_parse(value, where, answered))
        except RecordError as error:
            problems.append(str(error))
            continue
        places.append(where)
        tasks.append(sys.intern(name) if isinstance(name := value.get("task"), str) else None)
    return RecordFile(path, records, places, tasks, problems)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes `rows` as JSON lines, whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _raw_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Values of a list, or lines that are yet to be read as JSON: a broken one does not hide those behind it."""
    if not path.is_file():
        raise RecordError(f"record file {path} does not exist")
    try:
        refuse_pointers([path])
    except UserError as error:
        raise RecordError(str(error)) from error
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", line
        return
    for element in elements(path, "list"):  # every rank reads: the whole file as one value takes several times its size
        if isinstance(element.value, Damage):
            reason = f"at {element.where}, {element.value.reason}"
            raise RecordError(f"{path}: not a JSON list of records (JSON Lines are .jsonl): {reason}")
        yield f"{path}, {element.where}", element.value


def _loads(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))  # Windows programs begin a file with a byte-order mark
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number or a nesting beyond all limits
        raise RecordError(f"{where}: not valid JSON ({error})") from error


def _parse(raw: Any, where: str, answered: bool = True) -> Record:
    if not isinstance(raw, dict):
        raise RecordError(f"{where}: expected an object, got {type(raw).__name__}")
    if "id" not in raw:
        remedy = "" if raw.get("conversations") else f"; {_MESSAGES}"
        raise RecordError(f"{where}: the record has no 'id'{remedy}")
    if isinstance(raw["id"], bool) or not isinstance(raw["id"], (str, int, float)):
        raise RecordError(f"{where}: 'id' must be a string or a number, got {raw['id']!r}")
    where = f"{where} (id '{raw['id']}')"
    for key, remedy in _NOT_READ.items():
        if raw.get(key):
            raise RecordError(f"{where}: '{key}' is not read; {remedy}")
    images = _parse_images(raw, where)
    spelt = not images and raw.get("images") == []
    system, turns = _parse_conversation(raw.get("conversations"), where, answered, spelt)
    placeholders = 0 if spelt else sum(turn.question.count(IMAGE_PLACEHOLDER) for turn in turns)
    if images and not placeholders:  # LLaVA's own files always carry it; plain exports often do not
        first = turns[0]
        turns = (Turn(f"{IMAGE_PLACEHOLDER}\n{first.question}", first.answer), *turns[1:])
    elif placeholders != len(images):
        remedy = "" if images else f"; where it is text, {_SPELT}"
        raise RecordError(
            f"{where}: {placeholders} '{IMAGE_PLACEHOLDER}' in the text but {len(images)} image(s){remedy}"
        )
    references = [] if raw.get("references") is None else raw["references"]
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise RecordError(f"{where}: 'references' must be a list of strings")
    texts = [
        str(raw["id"]),
        system,
        *images,
        *(text for turn in turns for text in (turn.question, turn.answer)),
        *references,
    ]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character ("\ud800"), which a tokenizer refuses
        raise RecordError(f"{where}: its text is not valid Unicode ({error})") from error
    return Record(str(raw["id"]), tuple(images), turns, tuple(references), system)


def _parse_images(raw: dict[str, Any], where: str) -> list[str]:
    given = [key for key in ("image", "images") if raw.get(key) not in (None, "", [])]
    if not given:
        return []
    if len(given) == 2:
        raise RecordError(f"{where}: it has 'image' and 'images'; keep one of them")
    images = raw[given[0]]
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and "\0" not in image for image in images):
        raise RecordError(f"{where}: '{given[0]}' must be a path or a list of paths, got {raw[given[0]]!r}")
    return images


def _parse_conversation(conversation: Any, where: str, answered: bool, spelt: bool) -> tuple[str, tuple[Turn, ...]]:
    """The system message, empty if there is none, and the turns; `spelt`: ``<image>`` is text."""
    messages = conversation if isinstance(conversation, list) else []
    system, start = "", 0
    if messages and _side(messages[0]) == "system":
        system, start = messages[0].get("value"), 1
        if not isinstance(system, str) or (IMAGE_PLACEHOLDER in system and not spelt):
            raise RecordError(
                f"{where}: turn 0 is a system message: its 'value' must be a text without '{IMAGE_PLACEHOLDER}', got "
                f"{system!r}"
            )
    if len(messages) < start + 1 + answered:
        least = "one human and one gpt turn" if answered else "one human turn"
        raise RecordError(f"{where}: 'conversations' must be a list with at least {least}")
    values: list[str] = []
    for index, message in enumerate(messages[start:], start):
        side = _side(message)
        role = _ROLES.get(str(side))
        if role is None or not isinstance(message.get("value"), str):
            raise RecordError(
                f"{where}: turn {index} must be {{'from': 'human'|'gpt', 'value': text}}, got {message!r}"
                f"{'; a system message comes first' if side == 'system' else ''}"
            )
        if role != ("user", "assistant")[(index - start) % 2]:
            raise RecordError(f"{where}: turns must alternate human, gpt; turn {index} is '{side}'")
        if role == "assistant" and IMAGE_PLACEHOLDER in message["value"] and not spelt:
            raise RecordError(
                f"{where}: turn {index} is an answer with '{IMAGE_PLACEHOLDER}' in it; images belong to questions, and "
                f"where it is text in a record without any, {_SPELT}"
            )
        values.append(message["value"])
    if len(values) % 2 and answered:
        raise RecordError(f"{where}: the last turn must be a gpt answer")
    if len(values) % 2:
        values.append("")
    if answered and not any(answer.strip() for answer in values[1::2]):
        raise RecordError(f"{where}: no supervised token: every gpt turn is empty")
    return system, tuple(Turn(question, answer) for question, answer in zip(values[::2], values[1::2], strict=True))


def _side(message: Any) -> Any:
    return message.get("from") if isinstance(message, dict) else None
