"""Nothing in the host code of the loss waits for a device or copies a number to it, seen without a device.

Tensors without values stand for those on a GPU: reading a value raises, and every operator is seen, so that a copy
between host and device is too (it waits, and no CUDA graph can capture it). ``test_gpu_runtime.py`` asks a real one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from csrc_case import WithoutLaunches
from cuda_on_cpu import WideningProducts
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cotbal_kernels import functional, linear_task_cross_entropy, portable, task_cross_entropy
from cotbal_kernels.cuda_backend import CudaBackend
from cotbal_kernels.cuda_kernels import library
from cotbal_kernels.interface import Backend, LinearProblem, TokenLoss

M, D, V, K = 24, 16, 40, 3


class _NoCopies(TorchDispatchMode):
    """Refuses operators that take a tensor to another device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
        assert len(devices) <= 1, f"{func} copies between {devices}"
        return out


@pytest.fixture
def watched() -> Iterator[None]:
    with torch.device("meta"), _NoCopies():
        yield


def tensors(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight, labels, task ids, task weights."""
    hidden, weight = (torch.empty(rows, D, dtype=dtype, requires_grad=True) for rows in (M, V))
    labels = torch.empty(M, dtype=torch.int64)
    return hidden, weight, labels, torch.empty_like(labels), torch.empty(K, requires_grad=True)


def test_copies_and_reads_are_seen(watched: None) -> None:
    with pytest.raises(AssertionError, match="copies between"):
        torch.empty(3).copy_(torch.ones(3, device="cpu"))
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty(3).sum().item()


@pytest.mark.parametrize("normalizer", [1000, 1e6])
def test_a_number_as_normalizer(normalizer: float) -> None:
    """Tensors without values are made of numbers without a copy: for once these claim to be on a GPU."""
    with FakeTensorMode(), _NoCopies():
        weights_K = torch.empty(K, device="cuda")
        functional._as_tensor(normalizer, weights_K)
        with pytest.raises(AssertionError, match="copies between"):
            torch.as_tensor(normalizer, device="cuda")


@pytest.mark.parametrize("aggregation", ["token", "task", "sum", "none"])
@pytest.mark.parametrize("normalizer", [None, 1000, 1e6])
@pytest.mark.parametrize("shift", [False, True])
def test_around_the_ops(
    watched: None, monkeypatch: pytest.MonkeyPatch, aggregation: str, normalizer: float | None, shift: bool
) -> None:
    """A normalizer that is a number too."""
    monkeypatch.setattr(functional, "_autocast", lambda *tensors: tensors)  # these tensors know no autocast
    if aggregation in ("task", "sum"):
        normalizer = None
    options: dict[str, Any] = {"normalizer": normalizer, "aggregation": aggregation, "shift": shift}
    hidden, weight, *rest = tensors()
    for more in ({}, {"differentiable_tasks": True}, {"recompute": True}):
        linear_task_cross_entropy(hidden, weight, *rest, **options, **more).loss.sum().backward()
    logits = torch.empty(M, V, requires_grad=True)
    task_cross_entropy(logits, *rest, **options).loss.sum().backward()


def run_backend(backend: Backend, dtype: torch.dtype, spec: TokenLoss, chunk_size: int) -> None:
    """Every function of a backend once; frozen sides too."""
    hidden, weight, labels, task_ids, task_weights = (tensor.detach() for tensor in tensors(dtype))
    targets = backend.prepare_targets(labels, task_ids, task_weights, V, -100, True, False, M - 3)
    where = (targets.targets_M, targets.rows_N, targets.num_rows)
    problem = LinearProblem(hidden, weight, weight[:, 0].clone(), *where)
    for per_task, normalizer in ((False, None), (True, None), (False, torch.empty(())), (True, torch.empty(K))):
        backend.task_scales(task_weights, targets.tokens_K, targets.poison, normalizer, per_task)
    for need in ((True, True, True), (True, False, False), (False, True, False), (False, False, False)):
        backend.linear_forward(problem, targets.tasks_M, task_weights, need, spec, chunk_size)
    loss_M, hit_M, stats_2M = backend.linear_rows_forward(problem, spec, chunk_size)
    backend.task_sums(loss_M, hit_M, targets.tasks_M, K)
    grad_M = torch.empty(M)
    for into in (None, torch.empty(V, D), torch.empty_like(weight)):
        backend.linear_rows_backward(problem, grad_M, stats_2M, into, (True, True, True), spec, chunk_size, dtype)
    logits = hidden @ weight.t()
    _, _, stats_2M = backend.logits_rows_forward(logits, targets.targets_M, spec, chunk_size)
    for out in (torch.empty_like(logits), logits):
        backend.logits_rows_backward(grad_M, logits, targets.targets_M, stats_2M, spec, chunk_size, out)
    for out in (torch.empty_like(logits, dtype=torch.float32), logits):
        backend.scale_gradient(logits, grad_M.sum(), out)


SPECS = [TokenLoss(), TokenLoss(softcap=5.0, smoothing=0.1, z_loss=1e-3, scale=0.7, even=0.1 / V)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("spec", SPECS, ids=["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_portable(watched: None, dtype: torch.dtype, spec: TokenLoss) -> None:
    run_backend(portable, dtype, spec, 7)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton(
    watched: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, spec: TokenLoss, descriptors: bool
) -> None:
    """Everything but the launches, which are made with the device of the tensors as the current one."""
    pytest.importorskip("triton")
    from cotbal_kernels import triton_backend
    from cotbal_kernels.triton_kernels import ahead_of_time, configs, head, logits

    entered: list[torch.device] = []

    @contextmanager
    def on_device(tensor: torch.Tensor) -> Iterator[None]:
        entered.append(tensor.device)
        yield
        entered.pop()

    describe = ahead_of_time._describe

    def guarded(*launch: Any) -> ahead_of_time.Launch:
        assert entered[-1:] == [torch.device("meta")]
        return describe(*launch)

    for module in (head, logits, triton_backend):
        monkeypatch.setattr(module, "on_device", on_device)
    monkeypatch.setattr(ahead_of_time, "_describe", guarded)
    monkeypatch.setattr(configs, "limits_of", lambda device: ahead_of_time.LIMITS[90])
    monkeypatch.setattr(head, "can_use_tma", lambda weight_VD: descriptors)
    for chunk_size in (0, 4):  # one slice, several
        with ahead_of_time.recorded() as launches:
            run_backend(triton_backend, dtype, spec, chunk_size)
        assert {"compact_kernel", "project_kernel", "scale_kernel"} <= {one.kernel.__name__ for one in launches}


@pytest.mark.parametrize("spec", SPECS, ids=["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda(watched: None, dtype: torch.dtype, spec: TokenLoss) -> None:
    kernels = WithoutLaunches("meta")
    backend = CudaBackend(lambda device: kernels, WideningProducts())
    for chunk_size in (0, 7):
        run_backend(backend, dtype, spec, chunk_size)
    assert set(kernels.launched) == set(library._SIGNATURES)
