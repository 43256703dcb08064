"""Shared by the tests of a GPU: problems on the device, and the error of the materialised path beside ours.

Where there is no GPU the same tests are rehearsed at smaller sizes, with the Triton kernels compiled for sm_90
(some for sm_80, sm_89 and sm_100 too) and run as PTX, and the CPU build of csrc/: a test that nobody can run would not
be right on the day that somebody can.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cuda_on_cpu import cpu_backend
from loss_problems import Problem, error, make_problem
from torch import Tensor
from triton_as_ptx import ptx_backend

from cotbal_kernels import backends
from cotbal_kernels.reference import reference_linear_task_cross_entropy, reference_task_cross_entropy

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
COMPILED = {f"sm_{capability}": ptx_backend(capability) for capability in (80, 89, 90, 100)}
BACKENDS = ["triton", "cuda", "portable"] if ON_GPU else ["sm_90", "cuda_on_cpu"]
ALL_BACKENDS = BACKENDS if ON_GPU else [*COMPILED, "cuda_on_cpu"]
ALL = {"logit_softcap": 5.0, "label_smoothing": 0.1, "z_loss": 1e-3}
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")


class Sizes(NamedTuple):
    """Several tiles and ragged edges everywhere; more rows than find room in dW's memory beside the words ``V``."""

    shape: tuple[int, int]
    D: int
    V: int
    many: int  # a vocabulary of many slices
    chunk: int  # rows of logits that make the slices


# Tiles are up to 128 x 256 (x 64 in D), in float32 64 x 64 (x 16), where multiply-adds run one by one.
SIZES = Sizes((7, 111), 520, 1003, 32003, 64) if ON_GPU else Sizes((3, 57), 136, 601, 1003, 32)
FP32_SIZES = SIZES if ON_GPU else Sizes((3, 41), 72, 203, 331, 32)


def sizes_for(dtype: torch.dtype) -> Sizes:
    return FP32_SIZES if dtype == torch.float32 else SIZES


@pytest.fixture(autouse=True)
def rehearsal() -> Iterator[None]:
    """Without a GPU: the backends that stand in for it."""
    if ON_GPU:
        yield
        return
    torch.use_deterministic_algorithms(True)  # memory that nobody has written holds NaN
    stand_ins = {**COMPILED, "cuda_on_cpu": cpu_backend()}
    for name, backend in stand_ins.items():
        backends.register_backend(name, backend)
    yield
    torch.use_deterministic_algorithms(False)
    for name in stand_ins:
        del backends.BACKENDS[name]


def require(backend: str) -> None:
    """Skip, with the reason that a user would be given, where a backend cannot run."""
    if backend in ("triton", "cuda"):
        reason = backends.unavailable_reason(backend)
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")


def gpu_problem(*args: Any, **kwargs: Any) -> Problem:
    """``make_problem`` on the device; every floating-point tensor is a leaf."""
    p = make_problem(*args, **kwargs)
    moved = {name: value.detach().to(DEVICE) for name, value in vars(p).items()}
    return Problem(**{name: value.requires_grad_(value.is_floating_point()) for name, value in moved.items()})


def upstream_like(loss: Tensor) -> Tensor:
    """A gradient that is not all ones: for "none" it differs from row to row."""
    return torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs, upstream_like(loss)))


def exact_and_ordinary(p: Problem, with_bias: bool, **options: Any) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The float64 result, its gradients, and those of logits materialised in the dtype of the inputs.

    Behind the materialised logits is a float64 softmax, so this baseline is better than what a training loop has.
    """
    leaves = [p.hidden, p.weight, *([p.bias] if with_bias else [])]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    bias = wide[2] if with_bias else None
    expected = reference_linear_task_cross_entropy(*wide[:2], *p.tensors[2:], bias=bias, **options)
    exact = gradients(expected.loss, wide)
    logits = torch.nn.functional.linear(p.hidden, p.weight, p.bias if with_bias else None)
    ordinary = gradients(reference_task_cross_entropy(logits, *p.tensors[2:], **options).loss, leaves)
    return expected, exact, ordinary


def rms_error(actual: Tensor, expected: Tensor) -> float:
    difference = actual.double() - expected.double()
    return float(difference.square().mean().sqrt() / expected.double().square().mean().sqrt())


def assert_gradients(actual: list[Tensor], exact: list[Tensor], ordinary: list[Tensor], dtype: torch.dtype) -> None:
    """At most the materialised path's own error on the same inputs.

    Root mean square: within a tenth, since both draw their roundings at random. Largest: a single rounding may fall
    badly, so as much is allowed as two halves of a unit in the last place (the gradient of the logits, the result); in
    float32, where it is the order of up to 32003 terms that differs, sqrt(32003) * 6e-8.
    """
    largest = 1.1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for a, wanted, baseline in zip(actual, exact, ordinary, strict=True):
        assert a.dtype == dtype
        assert error(a, wanted) <= max(largest, error(baseline, wanted))
        limit = 1e-5 if dtype == torch.float32 else 1.1 * rms_error(baseline, wanted)
        assert rms_error(a, wanted) <= limit
