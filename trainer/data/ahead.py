"""Work on samples that other processes do ahead, handed over in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from trainer.errors import UserError
from trainer.launching import usable_cores

T = TypeVar("T")
_TOGETHER = 256  # pieces of work that go to a process at once
_MOST_PROCESSES = 16
_WORTH = 4096  # of fewer than these most would be done before processes have started


def made_ahead(make: Callable[[int], T], indices: Sequence[int], processes: int, pinned: bool = False) -> Iterator[T]:
    """``make(index)`` for every index, in order.

    Args:
        make: depends on its argument only; other processes have it as it is now.
        indices: there may be more of them than will ever be asked for.
        processes: that work ahead; 0 is this one, when it is asked.
        pinned: tensors come in memory that is copied to a GPU without a stop.
    """
    loader: DataLoader[T] = DataLoader(
        _Made(make),
        batch_size=None,
        sampler=indices,
        num_workers=processes,
        collate_fn=_unchanged,
        pin_memory=pinned,
        multiprocessing_context="fork" if processes else None,  # nothing of the records is copied
        generator=torch.Generator(),  # seeds of processes are drawn from this one, not from a training's
    )
    return iter(loader)


def tried(work: Callable[[int], T], indices: Sequence[int], processes: int) -> Iterator[T | str]:
    """``work(index)`` for every index, in order, or what its :class:`UserError` says; as :func:`made_ahead`."""

    def one(index: int) -> T | str:
        try:
            return work(index)
        except UserError as error:
            return str(error)

    def several(start: int) -> list[T | str]:
        return [one(index) for index in indices[start : start + _TOGETHER]]

    starts = range(0, len(indices), _TOGETHER)
    for found in made_ahead(several, starts, processes if len(indices) >= _WORTH else 0):
        yield from found


def accepted(found: T | str) -> T:
    """What :func:`tried` found, or its error again."""
    if isinstance(found, str):
        raise UserError(found)
    return found


def spare_processes() -> int:
    """How many processes may work while this one waits for them."""
    return min(usable_cores(), _MOST_PROCESSES)


class _Made(Dataset[T], Generic[T]):
    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make

    def __getitem__(self, index: int) -> T:
        return self._make(index)


def _unchanged(made: T) -> T:
    return made
