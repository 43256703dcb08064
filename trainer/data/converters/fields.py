"""Reading raw records without trusting them, and finding raw files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.data.converters.base import Rejected
from trainer.errors import UserError

PARQUET = ".parquet"
# What the library `datasets` writes beside tables.
_ABOUT_TABLES = frozenset({"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"})


def as_object(value: Any) -> dict[str, Any]:
    """The value, if it is an object; else `Rejected`."""
    if not isinstance(value, dict):
        raise Rejected("malformed", f"expected an object, got {shown(value)}")
    return value


def get_text(raw: dict[str, Any], key: str, empty: bool = False) -> str:
    """A text that is not blank, stripped; numbers are text as well, since answers such as 3 are written so."""
    value = raw.get(key)
    if (isinstance(value, float) and math.isfinite(value)) or (isinstance(value, int) and not isinstance(value, bool)):
        value = str(value)
    if not isinstance(value, str):
        raise Rejected("malformed", f"'{key}' must be text, got {shown(value)}")
    if not value.strip() and not empty:
        raise Rejected("empty text", f"'{key}' is empty")
    return value.strip()


def get_id(raw: dict[str, Any], key: str) -> str:
    """An identifier: text or a whole number."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise Rejected("malformed", f"'{key}' must be text or a whole number, got {shown(value)}")
    return str(value)


def get_number(raw: dict[str, Any], key: str) -> int:
    """A whole number that is not negative and below 2^53."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise Rejected("malformed", f"'{key}' must be a whole number, got {shown(value)}")
    return value


def get_list(raw: dict[str, Any], key: str) -> list[Any]:
    """A list."""
    value = raw.get(key)
    if not isinstance(value, list):
        raise Rejected("malformed", f"'{key}' must be a list, got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value in a message, not at full length."""
    text = repr(value) if not isinstance(value, (list, dict)) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def image_path(folder: str, name: str) -> str:
    """``folder/name`` as a path below the image root; `Rejected` if it would leave it."""
    path = f"{folder.rstrip('/')}/{name}" if folder else name
    if not name.strip() or "\0" in path or "\\" in path or path.startswith("/") or ".." in path.split("/"):
        raise Rejected("outside the image root", f"image path {shown(path)} must stay below the image root")
    return path


def find_file(folder: Path, names: Sequence[str], what: str) -> Path:
    """The first of `names` that exists under `folder`.

    Raises:
        UserError: none does.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no {what}: expected {' or '.join(names)}")


def files_below(source: Path, suffixes: Iterable[str], what: str) -> list[Path]:
    """`source` itself if it is a file, else every file below it with one of the suffixes, sorted.

    Raises:
        UserError: there is none, or only Parquet where it is not wanted.
    """
    if source.is_file() and source.suffix != PARQUET:
        return [source]
    wanted = set(suffixes)
    paths = [source] if source.is_file() else source.rglob("*")
    there = sorted(
        path
        for path in paths
        if path.suffix in wanted | {PARQUET} and path.name not in _ABOUT_TABLES and path.is_file()
    )
    found = [path for path in there if path.suffix in wanted]
    if there and not found:
        raise UserError(f"{there[0]} is Parquet, which 'messages' reads, and not {what} ({', '.join(sorted(wanted))})")
    if not found:
        raise UserError(f"{source} has no {what} ({', '.join(sorted(wanted))})")
    return found


_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test",
}  # fmt: skip


def split_of(path: Path, base: Path) -> str:
    """The split that a path's names below `base` speak of; ``train`` if they speak of none."""
    relative = path.relative_to(base) if path != base and path.is_relative_to(base) else Path(path.name)
    for part in reversed(relative.with_suffix("").parts):
        for word in reversed(part.lower().replace("-", "_").replace(".", "_").split("_")):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return "train"
