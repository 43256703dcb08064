"""JSON files larger than memory, one element at a time.

Elements are decoded by the standard library's decoder from a text window that slides over the file, so what counts
as JSON, and what a number becomes, is what ``json.loads`` says. Damage is a value that is handed on, not an
exception: a JSON Lines file goes on after a bad line; a list or an object ends there, because nothing after a
broken element can be told from its inside.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Container = Literal["lines", "list", "object"]
LARGEST_ELEMENT = 64 * 2**20  # characters; the limit is what keeps memory bounded in a damaged file
_WINDOW = 2**18  # characters
_SCALAR_END = 16  # no JSON token but a string is cut short by more than this many characters
_SPACE = " \t\n\r"


@dataclass(frozen=True, slots=True)
class Damage:
    """Why no value could be read at a place, and whether the file breaks off there."""

    reason: str
    ends: bool = True


@dataclass(frozen=True, slots=True)
class Element:
    """A value of a file: where it stands (``line 3``, ``questions[7]``), its key in an object, and the value."""

    where: str
    key: str | None
    value: Any
    offset: int = 0  # bytes of the file read so far, for progress


class _DamagedError(Exception):
    pass


def elements(path: Path, container: Container, key: str | None = None) -> Iterator[Element]:
    """The lines of a JSON Lines file, the elements of a list, or the members of an object.

    Args:
        path: a UTF-8 file, with or without a byte-order mark.
        container: what the file, or its member `key`, is.
        key: the member of the file's top-level object to go into; the others are skipped without being kept.

    Yields:
        elements in file order; one whose value is :class:`Damage` says what could not be read.
    """
    if container == "lines":
        yield from _lines(path)
        return
    with path.open("rb") as file:
        yield from _Reader(file, container, key).elements()


def _lines(path: Path) -> Iterator[Element]:
    offset = number = 0
    with path.open("rb") as file:
        while line := file.readline(LARGEST_ELEMENT):
            number += 1
            offset += len(line)
            if len(line) == LARGEST_ELEMENT and not line.endswith(b"\n"):
                while (rest := file.readline(LARGEST_ELEMENT)) and not rest.endswith(b"\n"):
                    offset += len(rest)
                offset += len(rest)
                yield Element(
                    f"line {number}", None, Damage(f"is longer than {LARGEST_ELEMENT} bytes", ends=False), offset
                )
            elif line.strip():
                yield Element(f"line {number}", None, _loads(line), offset)


def _loads(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number or a nesting beyond all limits
        return Damage(f"is not valid JSON: {error}", ends=not line.endswith(b"\n"))


class _Reader:
    """A window of text over a file and a place in it."""

    def __init__(self, file: Any, container: Container, key: str | None) -> None:
        self.file, self.container, self.key = file, container, key
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.json = json.JSONDecoder()
        self.text, self.place = "", 0
        self.dropped = 0  # bytes of the file before `text`
        self.ended = False
        self.not_utf8 = ""

    def elements(self) -> Iterator[Element]:
        last = "the beginning"
        try:
            if self.key is not None and not self._enter(self.key):
                yield Element(self._byte(), None, Damage(f"the file has no member '{self.key}'"))
                return
            walk = self._members() if self.container == "object" else self._items()
            for index, (key, value) in enumerate(walk):
                last = f"'{key}'" if key is not None else f"{self.key}[{index}]" if self.key else f"record {index}"
                yield Element(last, key, value, self.dropped + self.place)
            if self.key is None and self._peek():
                yield Element(self._byte(), None, Damage("text after the end of the JSON value"))
        except _DamagedError as error:
            reason = f"{error}; nothing after {last} could be read"
            yield Element(self._byte(), None, Damage(reason), self.dropped + self.place)

    def _byte(self) -> str:
        return f"byte {self.dropped + len(self.text[: self.place].encode('utf-8', 'surrogatepass'))}"

    def _fill(self) -> None:
        """Makes the window longer, by as much as it holds, or marks the end."""
        if self.ended:
            raise _DamagedError(self.not_utf8 or "the file ends in the middle of a value")
        kept = self.text[self.place :]
        if len(kept) > LARGEST_ELEMENT:
            raise _DamagedError(f"a value is longer than {LARGEST_ELEMENT} characters")
        self.dropped += len(self.text[: self.place].encode("utf-8", "surrogatepass"))
        raw = self.file.read(max(_WINDOW, len(kept)))
        try:
            more = self.decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            more = error.object[: error.start].decode("utf-8", "ignore")
            self.not_utf8 = f"the text is not valid UTF-8 ({error.reason})"
            raw = b""
        self.ended = not raw
        self.text, self.place = kept + more, 0

    def _peek(self) -> str:
        """The next character that is not white space, or "" at the end."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in _SPACE:
                self.place += 1
            if self.place < len(self.text):
                return self.text[self.place]
            if self.ended:
                if self.not_utf8:
                    raise _DamagedError(self.not_utf8)
                return ""
            self._fill()

    def _expect(self, wanted: str) -> str:
        found = self._peek()
        if not found:
            raise _DamagedError("the file ends in the middle of a value")
        if found not in wanted:
            raise _DamagedError(f"expected {' or '.join(wanted)}, found {found!r}")
        self.place += 1
        return found

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos + _SCALAR_END >= len(self.text)
                if not cut:
                    self.place = error.pos
                    raise _DamagedError(f"not valid JSON ({error.msg})") from error
                if self.ended:
                    raise _DamagedError(self.not_utf8 or f"the file ends in a broken value ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                raise _DamagedError(f"not a usable JSON value ({error})") from error
            else:
                # A number at the end of the window may go on after it: "1" as "1.5" or "1e+5".
                if end + 2 < len(self.text) or self.ended or isinstance(value, (str, list, dict)):
                    self.place = end
                    return value
            self._fill()

    def _items(self) -> Iterator[tuple[None, Any]]:
        self._expect("[")
        if self._peek() == "]":
            self.place += 1
            return
        while True:
            yield None, self._value()
            if self._expect(",]") == "]":
                return

    def _keys(self) -> Iterator[str]:
        """Keys of an object; whoever asks must take the value before the next."""
        self._expect("{")
        if self._peek() == "}":
            self.place += 1
            return
        while True:
            if self._peek() != '"':
                self._expect('"')
            key = self._value()
            self._expect(":")
            yield key
            if self._expect(",}") == "}":
                return

    def _members(self) -> Iterator[tuple[str, Any]]:
        for key in self._keys():
            yield key, self._value()

    def _enter(self, key: str) -> bool:
        for found in self._keys():
            if found == key:
                return True
            opening = self._peek()
            if opening == "[":
                for _ in self._items():
                    pass
            elif opening == "{":
                for _ in self._members():
                    pass
            else:
                self._value()
        return False
