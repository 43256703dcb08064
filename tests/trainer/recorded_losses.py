"""A recorded training for the tests of balancing methods: losses by step and task, which methods are played on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.balancing.method import BalancingMethod, MethodContext, StepReport, TaskLosses
from trainer.balancing.registry import method_class, read_options

N = 3
Array = NDArray[np.float64]
# Weights are float32; everything before is float64 on both sides.
FLOAT32 = {"rtol": 2e-7, "atol": 2e-7}


def make(name: str, options: dict[str, Any] | None = None, num_tasks: int = N, seed: int = 0) -> BalancingMethod:
    fixed = torch.linspace(0.5, 1.5, num_tasks) if num_tasks > 1 else torch.ones(1)
    context = MethodContext(num_tasks, torch.device("cpu"), seed, validation_batches=4, fixed_weights=fixed)
    return method_class(name)(context, read_options(name, options))


def losses(sums: Array, tokens: Array, norms: Array | None = None) -> TaskLosses:
    return TaskLosses(
        torch.from_numpy(sums), torch.from_numpy(tokens), None if norms is None else torch.from_numpy(norms)
    )


class Recording:
    """Sums, tokens, losses after the step and gradient norms of a training; the first steps lack the last task."""

    def __init__(self, steps: int, num_tasks: int = N, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        shape = (steps, num_tasks)
        self.tokens = random.integers(1, 40, shape).astype(np.float64)
        self.tokens[random.random(shape) < 0.2] = 0
        self.tokens[:3, -1] = 0
        self.tokens[:, 0] += 1  # one task is always there
        slope = np.linspace(0.5, 3, num_tasks)
        self.mean = 0.2 + np.exp(-slope * np.arange(steps)[:, None] / steps) * random.uniform(1, 4, shape)
        self.sums = self.mean * self.tokens
        self.after = self.sums * random.uniform(0.8, 1.05, shape)
        self.norms = random.uniform(0.1, 5, shape) * (self.tokens > 0)

    def lose_nothing(self, steps: slice, task: int) -> None:
        """Losses of exactly 0 in these steps, as of tokens that the model is certain of."""
        self.mean[steps, task] = self.sums[steps, task] = self.after[steps, task] = self.norms[steps, task] = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def step(self, t: int, with_norms: bool = True) -> TaskLosses:
        return losses(self.sums[t], self.tokens[t], self.norms[t] if with_norms else None)

    def play(self, method: BalancingMethod, epoch: Callable[[int], float] = lambda t: 0.0, start: int = 0) -> Array:
        """Weights used by every step ``[steps, N]``, and last those after the final one, as the loop calls a method.

        Validation batches, where asked for, are the recorded steps too: batch t before step t.
        """
        used = []
        for t in range(start, len(self)):
            if method.needs.validation:
                again = losses(self.after[t - 1], self.tokens[t - 1]) if t else None
                method.validated(self.step(t), again if method.needs.validation_again else None)
            method.before_step(self.step(t) if method.needs.losses_before else None)
            used.append(method.weights.numpy().copy())
            if method.needs.losses:
                after = losses(self.after[t], self.tokens[t])
                method.after_step(StepReport(t + 1, epoch(t), self.step(t), after))
        return np.array([*used, method.weights.numpy()])


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def normalised(w: Array) -> Array:
    return len(w) * w / w.sum()


def forward_filled(record: Recording) -> Array:
    """Loss of every step and task, an absent one's last; NaN before it was seen."""
    out = np.where(record.tokens > 0, record.mean, np.nan)
    for t in range(1, len(out)):
        out[t] = np.where(np.isnan(out[t]), out[t - 1], out[t])
    return out


def first_seen(filled: Array) -> Array:
    return np.array([column[column > 0][0] for column in filled.T])
