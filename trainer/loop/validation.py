"""Validation batches inside a training: for every update the same number of samples of every task.

Which samples belong to update u depends on the seed and u only, so an interrupted training goes on with the batches it
would have had, and every rank knows its share without being told.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from trainer.data.ahead import made_ahead
from trainer.data.encoding import IGNORE_INDEX

# Of each task, for L_i(0), whose noise stays in every later ratio of the task. With losses that spread by as much as
# their mean, the mean of 256 is good to 6 %.
INITIAL_RECORDS = 256

Sample = dict[str, Any]
Batch = dict[str, Tensor]


class ValidationBatches:
    """Draws from the validation sets of the balanced tasks, each in a fresh order for every pass over it.

    Args:
        sizes: validation records of each balanced task, none empty.
        sample: the encoded record `r` of balanced task `i`.
        collate: samples to a batch.
        per_task: samples of each task in one update, over all ranks.
        batch_size: rows per forward pass.
        seed: of the orders.
        rank, world: this process and how many there are.
        ahead: whether a process of its own makes the batches of the coming updates, in the order of updates.
        pinned: whether that leaves them in memory that is copied to a GPU without a stop.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        sample: Callable[[int, int], Sample],
        collate: Callable[[Sequence[Sample]], Batch],
        *,
        per_task: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        ahead: bool = False,
        pinned: bool = False,
    ) -> None:
        self.sizes = list(sizes)
        self.per_task = per_task
        self._sample = sample
        self._collate = collate
        self._batch_size = batch_size
        self._seed = seed
        self._rank, self._world = rank, world
        self._orders: dict[tuple[int, int], list[int]] = {}
        self._ahead, self._pinned = ahead, pinned
        self._coming: Iterator[list[Batch]] = iter(())
        self._made: tuple[int, list[Batch]] = (-1, [])  # the last update that was asked for

    @property
    def batches_per_pass(self) -> int:
        """M: updates until every record of the largest validation set was seen."""
        return -(-max(self.sizes) // self.per_task)

    def drawn(self, update: int) -> list[tuple[int, int]]:
        """(balanced task, record) of every sample of an update, the same on all ranks."""
        positions = range(update * self.per_task, (update + 1) * self.per_task)
        return [
            (task, self._order(task, position // size)[position % size])
            for task, size in enumerate(self.sizes)
            for position in positions
        ]

    def __call__(self, update: int) -> list[Batch]:
        """This rank's share as micro-batches; the same number of them on every rank, as ZeRO-3 needs.

        A rank that gets fewer samples than another fills up with samples whose labels are all ignored.
        """
        last, batches = self._made
        if update != last:
            if not self._ahead:
                batches = self.made(update)
            else:
                if update != last + 1 or last < 0:
                    self._coming = made_ahead(self.made, range(update, sys.maxsize), 1, self._pinned)
                batches = next(self._coming)
            self._made = update, batches
        return batches

    def made(self, update: int) -> list[Batch]:
        """What a call returns, made now."""
        return list(self._share(self.drawn(update)))

    def close(self) -> None:
        """Ends the process that makes batches."""
        self._coming, self._made = iter(()), (-1, [])

    def initial(self) -> Iterator[Batch]:
        """This rank's share of the first records of every task, ``INITIAL_RECORDS`` or all; batches as of an update."""
        chosen = [
            (task, record) for task, size in enumerate(self.sizes) for record in self._order(task, 0)[:INITIAL_RECORDS]
        ]
        return self._share(chosen)

    def _share(self, chosen: list[tuple[int, int]]) -> Iterator[Batch]:
        share = -(-len(chosen) // self._world)
        mine = chosen[self._rank :: self._world]
        real = len(mine)
        mine = mine + chosen[: share - real]
        for start in range(0, share, self._batch_size):
            batch = self._collate([self._sample(*item) for item in mine[start : start + self._batch_size]])
            batch["labels"][max(0, real - start) :] = IGNORE_INDEX
            yield batch

    def _order(self, task: int, turn: int) -> list[int]:
        key = (task, turn)
        if key not in self._orders:
            self._orders = {old: order for old, order in self._orders.items() if old[1] >= turn - 1 or old[0] != task}
            digest = hashlib.sha256(f"{self._seed}/{task}/{turn}".encode()).digest()
            order = list(range(self.sizes[task]))
            random.Random(digest).shuffle(order)
            self._orders[key] = order
        return self._orders[key]
