"""Shared by the loss tests: random problems and the comparison with the float64 reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Shapes: M positions, D hidden width, V vocabulary, K tasks.


@dataclass
class Problem:
    """One random input of the loss."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    task_ids: Tensor
    task_weights: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.labels, self.task_ids, self.task_weights


def make_problem(
    shape: tuple[int, ...] = (3, 17),
    *,
    D: int = 24,
    V: int = 67,
    K: int = 4,
    dtype: torch.dtype = torch.float32,
    ignored: float = 0.4,
    sharpness: float = 1.0,
    seed: int = 0,
) -> Problem:
    """Sizes are no powers of two and no multiples of a chunk; ``sharpness`` scales the logits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    labels = torch.randint(V, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = -100
    return Problem(
        hidden=normal(*shape, D).to(dtype).requires_grad_(),
        weight=(sharpness * normal(V, D) / D**0.5).to(dtype).requires_grad_(),
        bias=normal(V).to(dtype).requires_grad_(),
        labels=labels,
        task_ids=torch.randint(K, shape, generator=generator),
        task_weights=(torch.rand(K, generator=generator) + 0.25).requires_grad_(),
    )


def error(actual: Tensor | None, expected: Tensor) -> float:
    """Largest absolute error relative to the largest expected magnitude; infinite if anything is not finite."""
    assert actual is not None, "no gradient at all"
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    difference = (actual.detach().double() - expected.detach().double()).abs()
    if difference.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    return float(difference.max() / expected.detach().double().abs().max().clamp(min=1e-30))


# float32 sums of at most a few hundred terms of order one: each rounds by 6e-8 relative to the largest, and
# roundings add up like a random walk, so 2e-6 leaves a factor of about three over what is seen.
FP32 = 2e-6
