"""Inputs of a case, and one step of a loss on them.

Random hidden states: every peer here computes every logit. A kernel that skips small probabilities would skip most of
them on such inputs and must not be measured this way.

Legend: M positions, D hidden width, V vocabulary, K tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import DTYPES, LinearCase, LogitsCase
from bench.peers.base import Weighting

Loss = Callable[[], Tensor]


@dataclass
class Problem:
    """``scores``: hidden states [M, D] or logits [M, V]; ``weight_VD`` is None where logits are given."""

    scores: Tensor
    weight_VD: Tensor | None
    labels_M: Tensor  # int64, -100 where a position is not supervised
    weighting: Weighting | None

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"scores": self.scores, "weight": self.weight_VD}
        return {name: leaf for name, leaf in named.items() if leaf is not None and leaf.requires_grad}

    def clear(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None


def make(case: LinearCase | LogitsCase, device: torch.device, seed: int = 0) -> Problem:
    """The same numbers for every peer. Logits have about unit variance, the supervised positions lie scattered."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[case.dtype]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype).mul_(scale)

    weight_VD = None
    gradients = not (isinstance(case, LinearCase) and case.mode == "loss")
    if isinstance(case, LinearCase):
        scores = normal(case.M, case.D)
        weight_VD = normal(case.V, case.D, scale=case.D**-0.5)
        weight_VD.requires_grad_(gradients and case.mode != "frozen_head")
    else:
        scores = normal(case.M, case.V)
    labels_M = torch.randint(0, case.V, (case.M,), generator=generator, device=device)
    ignored = torch.randperm(case.M, generator=generator, device=device)[case.N :]
    labels_M[ignored] = -100
    weighting = None
    if case.tasks:
        task_ids_M = torch.randint(0, case.tasks, (case.M,), generator=generator, device=device)
        weighting = Weighting(task_ids_M, torch.linspace(0.6, 1.4, case.tasks, device=device))
    return Problem(scores.requires_grad_(gradients), weight_VD, labels_M, weighting)
