"""How far work is that goes through many records or images, when it takes a while: a bar on a terminal, lines
elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
DELAY = 1.0  # seconds of work before a bar appears
LINE_EVERY = 30.0  # seconds between lines when there is no terminal


def watched(items: Iterable[Item], title: str, unit: str, total: int | None = None) -> Iterable[Item]:
    """`items` with a bar that goes away at the end, or a line now and then. `total` is how many there are, where they
    have no length."""
    if sys.stderr.isatty():
        return tqdm(items, desc=title, unit=f" {unit}s", total=total, leave=False, delay=DELAY)
    return _with_lines(items, title, f"{'' if total is None else f' of {total:,}'} {unit}s")


def _with_lines(items: Iterable[Item], title: str, rest: str) -> Iterator[Item]:
    last = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last >= LINE_EVERY:
            last = time.monotonic()
            print(f"{title}: {number:,}{rest}", file=sys.stderr, flush=True)
