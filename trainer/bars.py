"""Bars for work that goes through many records or images: on a terminal only, and only when it takes a while."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
DELAY = 1.0  # seconds of work before a bar appears


def watched(items: Iterable[Item], title: str, unit: str, total: int | None = None) -> Iterable[Item]:
    """`items` with a bar that goes away at the end. `total` is how many there are, where they have no length."""
    return tqdm(items, desc=title, unit=f" {unit}s", total=total, leave=False, disable=None, delay=DELAY)
