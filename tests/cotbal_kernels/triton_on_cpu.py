"""The Triton backend in Triton's interpreter, for the tests of this directory.

Import the fixture ``on_cpu`` and pass ``backend="interpreter"``. Memory that nobody has written holds NaN in these
tests, so a kernel that reads it is found out.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter import interpreted
from loss_problems import Problem, error

from cotbal_kernels import TaskLoss, backends, linear_task_cross_entropy, triton_backend
from cotbal_kernels.reference import reference_linear_task_cross_entropy
from cotbal_kernels.triton_kernels import head

NAMES = [name for name in dir(backends.Backend) if not name.startswith("_")]


def _interpreted(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with interpreted():
            return function(*args)

    return call


INTERPRETED = SimpleNamespace(**{name: _interpreted(getattr(triton_backend, name)) for name in NAMES})


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """``backend="interpreter"`` is the Triton backend; uninitialised memory is NaN."""
    backends.register_backend("interpreter", INTERPRETED)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(9).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)
    del backends.BACKENDS["interpreter"]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, int]]:
    """Rows, rows stored in dW's memory, rows held in the workspace, and number of slices, of every plan made."""
    made: list[tuple[int, int, int, int]] = []
    plan_slices = head.plan_slices

    def spy(rows: int, *args: Any) -> Any:
        slices = plan_slices(rows, *args)
        made.append((rows, slices.stored_rows, slices.held_rows, len(slices.ranges())))
        return slices

    monkeypatch.setattr(head, "plan_slices", spy)
    return made


def upstream_like(loss: torch.Tensor) -> torch.Tensor:
    """A gradient that is not all ones: for "none" it differs from row to row."""
    return torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)


def gradients(out: TaskLoss, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(out.loss, inputs, upstream_like(out.loss), retain_graph=True)


def compare(p: Problem, tolerance: float, with_bias: bool = False, absolute: float = 1e-6, **options: Any) -> TaskLoss:
    """Assert that everything the Triton backend returns, and every gradient, is the float64 reference's."""
    bias = p.bias if with_bias else None
    own = {"differentiable_tasks", "recompute", "chunk_size", "max_tokens", "check"}
    expected = reference_linear_task_cross_entropy(
        *p.tensors, bias=bias, **{name: value for name, value in options.items() if name not in own}
    )
    out = linear_task_cross_entropy(*p.tensors, bias=bias, backend="interpreter", **options)
    assert_same(out, expected)
    inputs = [p.hidden, p.weight, p.task_weights, *([p.bias] if with_bias else [])]
    inputs = [tensor for tensor in inputs if tensor.requires_grad]
    for actual, wanted in zip(gradients(out, *inputs), gradients(expected, *inputs), strict=True):
        # A gradient of lambda is a small difference of terms of order ten: there float32 rounding of the terms counts.
        largest = float((actual.double() - wanted.double()).abs().max())
        limit = 1e-6 if actual.dtype == torch.float32 else absolute
        assert error(actual, wanted) <= tolerance or largest <= limit
    return out


def assert_same(out: TaskLoss, expected: TaskLoss, tolerance: float = 2e-6) -> None:
    """Losses, statistics and counts; 16-bit inputs too are multiplied and summed in float32."""
    assert out.loss.dtype == out.task_loss.dtype == out.lse.dtype == torch.float32
    assert error(out.loss, expected.loss) <= tolerance
    assert error(out.task_loss, expected.task_loss) <= tolerance
    assert error(out.lse, expected.lse) <= tolerance
    assert out.task_tokens.tolist() == expected.task_tokens.tolist()
    assert out.task_correct.tolist() == expected.task_correct.tolist()
