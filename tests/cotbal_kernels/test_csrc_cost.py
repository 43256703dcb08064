"""What a step of the CUDA backend costs, on the CPU build of its kernels: reads by the host, memory, products."""

import math
from collections import Counter

import pytest
import torch
from csrc_backend_case import arguments, linear_loss, needs_compiler, registered  # noqa: F401
from csrc_case import WithoutLaunches
from cuda_on_cpu import WideningProducts, kernels_for
from loss_problems import FP32, error, make_problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.full_size import Operators
from cotbal_kernels import backends, linear_task_cross_entropy
from cotbal_kernels.cuda_backend import CudaBackend
from cotbal_kernels.cuda_kernels import head
from cotbal_kernels.interface import TokenLoss
from cotbal_kernels.reference import reference_linear_task_cross_entropy

pytestmark = needs_compiler


class Watch(TorchDispatchMode):
    """Notes every op that reads a value back to the host or has a shape that depends on one, and the largest result."""

    SYNCHRONISING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.synchronised: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.SYNCHRONISING:
            self.synchronised.append(str(func))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel() * result.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_read_back_to_the_host(cuda_on_cpu: CudaBackend, dtype: torch.dtype) -> None:
    p = make_problem(dtype=dtype)
    problem, targets, lam = arguments(p)
    spec, need = TokenLoss(2.0, 0.1, 0.01, 0.7, 0.1 / 67), (True,) * 3
    logits, grad_M = torch.randn(51, 67).to(dtype), torch.rand(51)
    with Watch() as watch:
        out = cuda_on_cpu.linear_forward(problem, targets.tasks_M, lam, need, spec, 7)
        cuda_on_cpu.scale_gradient(out.grad_weight_VD, torch.tensor(2.0), out.grad_weight_VD.to(dtype))
        *_, stats = cuda_on_cpu.linear_rows_forward(problem, spec, 7)
        for into in (None, torch.zeros(67, 24), torch.zeros(67, 24, dtype=dtype)):
            cuda_on_cpu.linear_rows_backward(problem, grad_M, stats, into, need, spec, 7, dtype)
        *_, stats = cuda_on_cpu.logits_rows_forward(logits, targets.targets_M, spec, 0)
        cuda_on_cpu.logits_rows_backward(grad_M, logits, targets.targets_M, stats, spec, 0, logits)
    assert watch.synchronised == []
    assert watch.largest > 0
    with Watch() as watch:
        assert bool(grad_M.sum() > 0)
    assert watch.synchronised != []  # it can tell


def test_the_workspace_is_bounded(cuda_on_cpu: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """No result beyond the workspace: M x V in float32 would be five times larger, and dW is small."""
    monkeypatch.setattr(head, "WORKSPACE_BYTES", 2**20)
    p = make_problem((1, 400), D=4, V=3000, ignored=0.0, dtype=torch.bfloat16)
    problem, targets, lam = arguments(p)
    with Watch() as watch:
        cuda_on_cpu.linear_forward(problem, targets.tasks_M, lam, (True,) * 3, TokenLoss(), 0)
    assert 2**19 < watch.largest <= 2**20
    expected = reference_linear_task_cross_entropy(*p.tensors)
    assert error(linear_loss(*p.tensors).loss, expected.loss) <= FP32


def test_default_chunks_are_as_few_as_whole_tiles_allow() -> None:
    """At V = 128256 a row of logits takes 501 KiB of the 512 MiB."""
    row_bytes = 4 * 128256
    limit = head.WORKSPACE_BYTES // row_bytes
    assert limit == 1046
    for capacity, size in ((1, 1), (700, 700), (1046, 1046), (1047, 640), (1700, 896), (1966, 1024), (20000, 1024)):
        assert head.default_chunk(capacity, row_bytes) == size
    for capacity in (8192, 16384):
        assert capacity % head.default_chunk(capacity, row_bytes) == 0  # all of 1024
    for capacity in range(1047, 30_000, 131):
        sizes = range(128, limit, 128)
        fewest = min(math.ceil(capacity / size) for size in sizes)
        smallest = min(size for size in sizes if math.ceil(capacity / size) == fewest)
        assert head.default_chunk(capacity, row_bytes) == smallest
    assert head.default_chunk(7, 2**28) == 2  # two rows of a quarter of a gigabyte
    assert head.default_chunk(7, 2**30) == 1  # a row that does not fit is computed nevertheless


class NotedProducts(WideningProducts):
    """Which product went where."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def wide(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        self.calls.append(("wide", tuple(out.shape), out.dtype))
        super().wide(left, right, out)

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        self.calls.append(("add", tuple(total.shape), total.dtype))
        super().add(total, left, right)

    def rounded(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        self.calls.append(("rounded", tuple(out.shape), out.dtype))
        super().rounded(left, right, out)


def test_products_and_buffers() -> None:
    """Three products a chunk, none for a side that is frozen; no 16-bit dW has one in float32 beside it."""
    f32, bf16, V, D = torch.float32, torch.bfloat16, 400, 64
    logits, hidden = ("wide", (30, V), f32), ("wide", (30, D), f32)
    for dtype, need, chunk_size, expected in (
        (bf16, (True, True, True), 0, [logits, hidden, ("rounded", (V, D), bf16)]),
        (f32, (True, True, True), 0, [logits, hidden, ("wide", (V, D), f32)]),
        (bf16, (True, False, False), 0, [logits, hidden]),
        (bf16, (False, True, False), 0, [logits, ("rounded", (V, D), bf16)]),
        (bf16, (False, False, False), 0, [logits]),
        (
            *(f32, (False, True, False), 20),
            [("wide", (20, V), f32), ("wide", (V, D), f32), ("wide", (10, V), f32), ("add", (V, D), f32)],
        ),
        # All rows wait in dW's memory, and one slice of them fits the workspace.
        (
            *(bf16, (True, True, False), 20),
            [
                *[("wide", (20, V), f32), ("wide", (20, D), f32), ("wide", (10, V), f32), ("wide", (10, D), f32)],
                ("rounded", (V, D), bf16),
            ],
        ),
    ):
        p = make_problem((1, 30), D=D, V=V, dtype=dtype)
        problem, targets, lam = arguments(p)
        products = NotedProducts()
        backend = CudaBackend(kernels_for, products)
        out = backend.linear_forward(problem, targets.tasks_M, lam, need, TokenLoss(), chunk_size)
        assert products.calls == expected
        found = (out.grad_hidden_MD, out.grad_weight_VD, out.grad_bias_V)
        full = (30 * D, V * D, V)
        assert [g.numel() for g in found] == [n if wanted else 0 for n, wanted in zip(full, need, strict=True)]
    # Recomputed: slices of 256 columns have all rows, dX is a sum over slices, and a buffer in float32 is added to.
    p = make_problem((1, 30), D=D, V=V, dtype=bf16)
    problem, *_ = arguments(p)
    products = NotedProducts()
    backend, spec = CudaBackend(kernels_for, products), TokenLoss()
    *_, stats = backend.linear_rows_forward(problem, spec, 20)
    for need, into in (((False, True, False), torch.zeros(V, D)), ((True, True, False), None)):
        products.calls.clear()
        backend.linear_rows_backward(problem, torch.ones(30), stats, into, need, spec, 20, bf16)
        expected, hidden = [], "wide"
        for width in (144, 256):
            expected.append(("wide", (30, width), f32))
            if need[0]:
                expected.append((hidden, (30, D), f32))
                hidden = "add"
            expected.append(("rounded", (width, D), bf16) if into is None else ("add", (width, D), f32))
        assert products.calls == expected


class NoProducts:
    """Each would be one launch."""

    def wide(self, left: Tensor, right: Tensor, out: Tensor) -> None: ...

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None: ...

    def rounded(self, left: Tensor, right: Tensor, out: Tensor) -> None: ...


# Zeros for losses, hits, statistics, dX and db, two for the loss, lse, the upstream gradient, and one that is a launch
# of ours: the preparation of the targets.
# float16 is lifted and lowered. Of four 16-bit chunks a part of the first one (in float16 of the second, the kernel
# writes the first there) is copied to the memory of dW, the last one within the workspace; from there both, that one in
# two halves, to the slice, whose targets are shifted.
@pytest.mark.parametrize(
    ("dtype", "chunks", "operators"),
    [
        (torch.float32, 1, 10),
        (torch.float32, 4, 10),
        (torch.bfloat16, 1, 10),
        (torch.bfloat16, 4, 10 + 6),
        (torch.float16, 1, 25),
        (torch.float16, 4, 25 + 6),
    ],
)
def test_operators_beside_the_launches(dtype: torch.dtype, chunks: int, operators: int) -> None:
    """A step takes a few operators of PyTorch, but for copies none of them once a chunk, and three launches a chunk."""
    kernels = WithoutLaunches("cpu")
    backends.register_backend("recorded", CudaBackend(lambda device: kernels, NoProducts()))
    try:
        hidden, weight = (torch.empty(rows, 16, dtype=dtype, requires_grad=True) for rows in (24, 40))
        labels, lam = torch.zeros(24, dtype=torch.int64), torch.ones(3)
        with Operators() as counted:
            out = linear_task_cross_entropy(
                hidden, weight, labels, labels, lam, backend="recorded", chunk_size=24 // chunks
            )
            out.loss.backward()
    finally:
        del backends.BACKENDS["recorded"]
    assert (counted.writing, counted.synchronising) == (operators, 0)
    of_chunk = dict.fromkeys(("cotbal_gather_rows", "cotbal_chunk_gradient", "cotbal_scatter_rows"), chunks)
    once = dict.fromkeys(("cotbal_compact", "cotbal_task_scales", "cotbal_task_sums"), 1)
    of_slice = dict.fromkeys(
        ("cotbal_gather_rows", "cotbal_saved_gradient"), int(chunks > 1 and dtype != torch.float32)
    )
    launched = Counter(kernels.launched)
    assert launched == Counter(of_chunk) + Counter(once) + Counter(of_slice) + Counter({"cotbal_scale_gradient": 2})
