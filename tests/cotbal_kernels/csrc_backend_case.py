"""Shared by the tests of the CUDA backend on the CPU build of its kernels. Import the fixture ``registered``."""

import functools
from collections.abc import Iterator

import pytest
import torch
from cuda_on_cpu import cpu_backend, find_compiler
from loss_problems import FP32, Problem, error
from torch import Tensor

from cotbal_kernels import backends, portable
from cotbal_kernels import linear_task_cross_entropy as any_linear_loss
from cotbal_kernels.cuda_backend import CudaBackend
from cotbal_kernels.interface import LinearProblem, Targets

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: CXX, g++, c++")
linear_loss = functools.partial(any_linear_loss, backend="cuda_on_cpu")


@pytest.fixture(autouse=True, name="cuda_on_cpu")
def registered() -> Iterator[CudaBackend]:
    """Registered for the length of a test; one thread, since the tensors are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    backend = cpu_backend()
    backends.register_backend("cuda_on_cpu", backend)
    yield backend
    del backends.BACKENDS["cuda_on_cpu"]
    torch.set_num_threads(before)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """With an upstream gradient that differs from row to row where the loss is one per position."""
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return torch.autograd.grad(loss, inputs, upstream, retain_graph=True)


def assert_same(out, expected, inputs, tolerance: float = FP32) -> None:
    for actual, wanted in zip(out[:2] + out[4:], expected[:2] + expected[4:], strict=True):
        assert actual.dtype == torch.float32
        assert error(actual, wanted) <= tolerance
    assert out.task_tokens.tolist() == expected.task_tokens.tolist()
    assert out.task_correct.tolist() == expected.task_correct.tolist()
    for actual, wanted in zip(gradients(out.loss, *inputs), gradients(expected.loss, *inputs), strict=True):
        # d loss / d lambda is a difference of terms up to a hundred times larger: float32 rounding of those.
        assert error(actual, wanted) <= tolerance or float((actual - wanted).abs().max()) <= 1e-6


def arguments(p: Problem) -> tuple[LinearProblem, Targets, Tensor]:
    """What the ops hand to a backend."""
    lam = p.task_weights.detach()
    sizes = (p.weight.shape[0], -100, True, False, p.labels.numel())
    targets = portable.prepare_targets(p.labels.flatten(), p.task_ids.flatten(), lam, *sizes)
    head = p.hidden.detach().flatten(0, 1), p.weight.detach(), p.bias.detach()
    return LinearProblem(*head, targets.targets_M, targets.rows_N, targets.num_rows), targets, lam
