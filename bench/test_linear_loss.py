"""Forward and backward of the linear loss on a CPU, beside the materialised path and PyTorch's own fused one.

    pytest bench/ --benchmark-only --benchmark-group-by=param:case

Every peer is first shown to compute the same loss and gradients as the float64 reference; weights are all ones,
since no peer has task weights. Rows that are not supervised cost the peers as much as the others.

Legend: M positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from cotbal_kernels import linear_task_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison; `supervised` is the share of positions with a label."""

    M: int
    D: int
    V: int
    supervised: float

    def __str__(self) -> str:
        return f"M{self.M}-D{self.D}-V{self.V}-{self.supervised:.0%}"


# The head of SmolLM2-135M (49152 x 576); 12 % is what LLaVA data typically supervises.
CASES = [Case(512, 576, 49152, 1.0), Case(512, 576, 49152, 0.12)]


def fused(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> Tensor:
    task_ids = torch.zeros_like(labels_M)
    return linear_task_cross_entropy(hidden_MD, weight_VD, labels_M, task_ids, torch.ones(1)).loss


def materialised(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_MD, weight_VD).float(), labels_M)


PEERS: dict[str, Loss] = {"cotbal": fused, "materialised": materialised}
if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
    PEERS["torch"] = lambda hidden, weight, labels: F.linear_cross_entropy(hidden, weight, labels)


def problem(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_MD = torch.randn(case.M, case.D, generator=generator)
    weight_VD = torch.randn(case.V, case.D, generator=generator) * case.D**-0.5
    labels_M = torch.randint(0, case.V, (case.M,), generator=generator)
    labels_M[torch.rand(case.M, generator=generator) >= case.supervised] = -100
    return hidden_MD.requires_grad_(), weight_VD.requires_grad_(), labels_M


def step(loss: Loss, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden_MD.grad = weight_VD.grad = None
    value = loss(hidden_MD, weight_VD, labels_M)
    value.backward()
    assert hidden_MD.grad is not None
    assert weight_VD.grad is not None
    return value.detach(), hidden_MD.grad, weight_VD.grad


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("peer", PEERS)
def test_forward_and_backward(benchmark: BenchmarkFixture, case: Case, peer: str) -> None:
    hidden_MD, weight_VD, labels_M = problem(case)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_MD, weight_VD)]
    expected = step(materialised_double, exact[0], exact[1], labels_M)
    for found, value in zip(step(PEERS[peer], hidden_MD, weight_VD, labels_M), expected, strict=True):
        # fp32 products over D and V: 1e-4 of the largest entry is two orders above what is seen.
        assert (found.double() - value).abs().max() <= 1e-4 * value.abs().max()
    benchmark(step, PEERS[peer], hidden_MD, weight_VD, labels_M)


def materialised_double(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_MD, weight_VD), labels_M)
