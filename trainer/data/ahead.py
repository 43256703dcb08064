"""Work on samples that other processes do ahead, handed over in order."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from trainer.errors import UserError
from trainer.launching import usable_cores
from trainer.units import byte_size

T = TypeVar("T")
SHARED = Path("/dev/shm")  # where processes hand over tensors
BATCHES_AHEAD = 2  # of each process, DataLoader's default
_MORE_ROOM = "make it larger (docker's --shm-size), or lower training.dataloader_workers; 0 needs none of it"
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


def handed_over(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, with its tensors in shared memory where this is a process that works ahead.

    Left to its queue, a batch that finds no room would be lost with a message, and the training would wait for ever.

    Raises:
        UserError: there is no room.
    """
    if get_worker_info() is not None:
        try:
            for value in batch.values():
                if isinstance(value, Tensor):
                    value.share_memory_()
        except RuntimeError as error:
            raise shared_memory_is_full() from error
    return batch


def shared_memory_is_full() -> UserError:
    """What happened, and what helps."""
    return UserError(f"{SHARED} is full, where processes that encode samples hand them over; {_MORE_ROOM}")


def check_shared_memory(processes: int, batch: float) -> None:
    """Looks for room for what processes hand over.

    Args:
        processes: on this machine.
        batch: bytes of a batch.

    Raises:
        UserError: there is too little.
    """
    if not processes or not SHARED.is_dir():
        return
    needed, free = processes * BATCHES_AHEAD * batch, shutil.disk_usage(SHARED).free
    if free < needed:
        raise UserError(
            f"{SHARED} has {byte_size(free)} free, and {processes} processes that encode samples hand over about "
            f"{byte_size(needed)} there; {_MORE_ROOM}"
        )


class _Made(Dataset[T], Generic[T]):
    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make

    def __getitem__(self, index: int) -> T:
        return self._make(index)


def _unchanged(made: T) -> T:
    return made
