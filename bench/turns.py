"""Whose turn it is, in a file beside the results: another process can tell from it who never comes to an end."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Turn:
    """Times are those of ``time.monotonic()``, which all processes share."""

    case: str
    peer: str | None  # None: what the case needs beside its peers
    began: float
    started: float  # of the whole run


_current: tuple[Path, Turn] | None = None


def file_of(results: Path) -> Path:
    return results.with_suffix(".turn")


def begin(results: Path | None, case: str, started: float) -> None:
    """A case begins; without ``results`` nobody watches, and nothing is written."""
    global _current
    _current = None if results is None else (file_of(results), Turn(case, None, 0.0, started))
    take(None)


def take(peer: str | None) -> None:
    """It is the turn of ``peer`` from here to the next call."""
    if _current is None:
        return
    path, turn = _current
    partial = path.with_suffix(".turn-partial")
    partial.write_text(json.dumps(asdict(replace(turn, peer=peer, began=time.monotonic()))), encoding="utf-8")
    partial.replace(path)


def end() -> None:
    """Nothing is under way any more."""
    global _current
    if _current is not None:
        _current[0].unlink(missing_ok=True)
    _current = None


def read(results: Path) -> Turn | None:
    """The turn that is, or was, under way; None before the first and after the last."""
    try:
        return Turn(**json.loads(file_of(results).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
