"""Pickles of plain data: numbers, texts, lists, tuples and dicts, and nothing that a pickle could call.

Two locks: only opcodes of plain data are obeyed, so that one that imports, builds or calls anything stops the
reading, and no class is ever found.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.data.raw_json import Damage, Element

_PLAIN = frozenset(
    """
    MARK STOP POP POP_MARK DUP PROTO FRAME NONE NEWTRUE NEWFALSE
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
    UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET
    GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE
    """.split()  # noqa: SIM905
)


class _Handlers(dict[int, Any]):
    def __missing__(self, code: int) -> Any:
        name = next((opcode.name for opcode in pickletools.opcodes if ord(opcode.code) == code), f"code {code}")
        raise pickle.UnpicklingError(f"it would run code or build objects ({name})")


# Python's own unpickler, not the one in C: that one sizes a table by whatever number a file claims.
class _PlainUnpickler(pickle._Unpickler):
    dispatch = _Handlers(
        {
            ord(opcode.code): pickle._Unpickler.dispatch[ord(opcode.code)]
            for opcode in pickletools.opcodes
            if opcode.name in _PLAIN
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_plain(path: Path) -> Any:
    """The data of a pickle written by Python 2 or 3 (Python 2's byte strings become text, as latin-1).

    Raises:
        ValueError: it is damaged, or holds anything but plain data; the byte is named.
    """
    with path.open("rb") as file:
        try:
            return _PlainUnpickler(file, encoding="latin-1").load()
        except Exception as error:  # a damaged pickle trips its handlers in every way there is
            place = min(file.tell(), path.stat().st_size)
            raise ValueError(
                f"not a pickle of plain data: near byte {place}: {error or type(error).__name__}"
            ) from error


def pickled_list(path: Path) -> Iterator[Element]:
    """Elements of a pickled list, or one :class:`Damage`."""
    try:
        data = load_plain(path)
    except ValueError as error:
        yield Element("the file", None, Damage(str(error)))
        return
    if not isinstance(data, list):
        yield Element("the file", None, Damage(f"expected a pickled list, got {type(data).__name__}"))
        return
    for index, value in enumerate(data):
        yield Element(f"record {index}", None, value)
