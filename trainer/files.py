"""Files that are there whole or not at all, after a crash of the machine too."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.errors import UserError, listed

_POINTER = b"version https://git-lfs.github.com/spec/"


def write_whole(path: Path, text: str) -> None:
    """Writes UTF-8 text whole or not at all: what was there before stays until the new text is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Refuses files that are not there but for what Git LFS writes in place of them, as a clone without it has.

    Raises:
        UserError: the first of them by name.
    """
    found = []
    for path in paths:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                found.append(str(path))
    if found:
        raise UserError(f"{listed(found)}: only Git LFS's pointer is there, not the file; fetch it with 'git lfs pull'")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def known(value: float) -> float | None:
    """JSON has no NaN and no infinity: null for those."""
    return value if math.isfinite(value) else None


def put_in_place(partial: Path, folder: Path) -> None:
    """Makes a folder that is written to its end `folder`, in place of one that may be there."""
    force_to_disk(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _force(folder.parent)


def force_to_disk(folder: Path) -> None:
    """Waits until everything that this machine has written into a folder is on the disk.

    The system writes when it sees fit, a minute later perhaps; what it has not written is lost in a crash, while a
    small file made after it may be there.
    """
    for path in (*folder.rglob("*"), folder):
        _force(path)


def _force(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # of a file system that has no such call for folders
            raise
    finally:
        os.close(descriptor)
