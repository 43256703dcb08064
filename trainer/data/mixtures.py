"""The training sets of Algorithm 1: mini subsets, "i + mini", one task (or its mini) alone, and everything.

Every mini subset has the same share of its task (CoTBal section 3.3: the ratio must be the same for a fair
measure of difficulty) and depends on the seed and the task's name only, so all proxies see the same one.
Auxiliary tasks are in the mini mixtures as minis, in the full mixture whole, and in no single-task training.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")
MixtureKind = Literal["mini", "plus", "single", "single_mini", "all"]


@dataclass(frozen=True)
class Mixture:
    """Which records a training sees.

    ``mini``: every task's mini; ``plus``: one task whole, minis of the rest; ``single``: one task alone;
    ``single_mini``: one task's mini alone; ``all``: everything.
    """

    kind: MixtureKind
    task: str | None = None

    def share(self, task: str, mini_ratio: float) -> float:
        """The share of `task`'s records in this mixture: 0, `mini_ratio` or 1."""
        if self.kind in ("single", "single_mini") and task != self.task:
            return 0.0
        if self.kind in ("mini", "single_mini"):
            return mini_ratio
        return 1.0 if self.kind == "all" or task == self.task else mini_ratio


def mini_size(records: int, ratio: float) -> int:
    """Number of records in a mini subset: the rounded share, at least one."""
    return min(records, max(1, round(records * ratio)))


def mini_subset(records: Sequence[T], ratio: float, seed: int, task: str) -> list[T]:
    """A random subset of `records` in their original order, the same for the same seed and task name."""
    generator = random.Random(hashlib.sha256(f"{seed}/{task}".encode()).digest())
    chosen = sorted(generator.sample(range(len(records)), mini_size(len(records), ratio)))
    return [records[index] for index in chosen]


def select(records: Sequence[T], share: float, seed: int, task: str) -> Sequence[T]:
    """`records` for a share that :meth:`Mixture.share` gave."""
    if share >= 1.0:
        return records
    return mini_subset(records, share, seed, task) if share > 0.0 else []


def optimizer_steps(samples: int, batch: int, epochs: float, accumulation: int = 1) -> int:
    """Steps of a training, as transformers counts them: an epoch ends with a smaller batch and a smaller window.

    Args:
        samples: records, or packed sequences.
        batch: samples of one micro-batch, over all processes.
        accumulation: micro-batches of one step.
    """
    windows = math.ceil(math.ceil(samples / batch) / accumulation)
    return math.ceil(windows * epochs)
