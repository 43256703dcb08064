"""dW of the CUDA backend slice by slice: the plan against its definition, what waits where, and what it costs."""

import math

import pytest
import torch
from csrc_backend_case import arguments, needs_compiler, registered  # noqa: F401
from csrc_case import WithoutLaunches
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_problems import FP32, error, make_problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.guard import Peak
from cotbal_kernels.cuda_backend import CudaBackend
from cotbal_kernels.cuda_kernels.slices import (
    SLICE_MULTIPLE,
    STORED_MULTIPLE,
    Slices,
    Waiting,
    plan_slices,
    slice_buffers,
)
from cotbal_kernels.interface import LinearProblem, TokenLoss
from cotbal_kernels.reference import reference_linear_task_cross_entropy

pytestmark = needs_compiler


@settings(max_examples=300, deadline=None)
@given(
    chunk=st.integers(1, 1500),
    more=st.integers(1, 9000),
    vocab_size=st.integers(1, 9000),
    width=st.integers(1, 5000),
    places=st.sampled_from([0, 1, 2]),
)
def test_plans_against_their_definition(chunk: int, more: int, vocab_size: int, width: int, places: int) -> None:
    """``places`` is how many 16-bit elements an element of dW has room for: one, two in float16; none to recompute."""
    rows, stride, storage = chunk + more, -(-vocab_size // 32) * 32, places * vocab_size * width
    plan = plan_slices(rows, vocab_size, chunk, stride, storage)
    slices = math.ceil(vocab_size / plan.width)
    assert plan.width % SLICE_MULTIPLE == 0
    assert plan.bounds[0][0] == 0
    assert plan.bounds[-1][1] == vocab_size
    assert all(stop == first for (_, stop), (first, _) in zip(plan.bounds, plan.bounds[1:], strict=False))
    assert len(plan.bounds) == slices
    # What waits fits the memory, and what waits of earlier slices ends where dW of this one begins, or before.
    assert slices * plan.stored * plan.width <= storage
    assert all(s * plan.stored * plan.width <= s * plan.width * places * width for s in range(slices))
    # The chunk that is held is the last one, and there only where the rows do not all have a place in dW's memory.
    last = rows - (math.ceil(rows / chunk) - 1) * chunk
    assert plan.held == (last if storage and plan.stored < rows else 0)
    assert plan.stored + plan.held <= rows
    if plan.stored + plan.held < rows and plan.stored > STORED_MULTIPLE:
        assert plan.stored % STORED_MULTIPLE == 0

    def needed(plan: Slices) -> int:
        """Float32 elements of a slice: gradients of 16 bits, which lie in the logits where all are computed."""
        again = rows - plan.stored - plan.held
        return again * plan.width + (0 if again == rows else rows * plan.width // 2)

    def free(plan: Slices) -> int:
        return (chunk - math.ceil(plan.held / 2)) * stride

    assert needed(plan) <= free(plan) or plan.width == SLICE_MULTIPLE
    wider = (slices - 1) and math.ceil(vocab_size / (slices - 1) / SLICE_MULTIPLE) * SLICE_MULTIPLE
    if wider and wider != plan.width:  # one slice less would not fit
        room = storage // (math.ceil(vocab_size / wider) * wider)
        stored, held = (rows, 0) if room >= rows else (room, last if storage else 0)
        if room < rows:
            stored = min(room // STORED_MULTIPLE * STORED_MULTIPLE or room, rows - held)
        fewer = Slices(wider, vocab_size, stored, held)
        assert needed(fewer) > free(fewer)


# N, D, V, rows of a chunk, (stored, again, held, slices) in bfloat16; float16 has twice the room in dW.
CASES = [
    (40, 64, 300, 37, (40, 0, 0, 1)),
    (40, 64, 700, 13, (40, 0, 0, 2)),
    (60, 24, 300, 25, (18, 32, 10, 3)),
    (61, 16, 140, 31, (8, 23, 30, 2)),
    (53, 1, 300, 11, (0, 44, 9, 3)),
    (300, 150, 131, 70, (76, 204, 20, 2)),
    (330, 270, 257, 100, (128, 172, 30, 3)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "D", "V", "chunk", "expected"), CASES)
def test_gradients_wherever_rows_wait(
    cuda_on_cpu: CudaBackend, dtype: torch.dtype, rows: int, D: int, V: int, chunk: int, expected: tuple[int, ...]
) -> None:
    """Rows in the memory of dW, in the workspace, computed again; the last ones of the capacity are none."""
    stride = -(-V // 32) * 32
    plan = plan_slices(rows, V, chunk, stride, V * D)
    start, stop = plan.again(rows)
    assert (plan.stored, stop - start, plan.held, len(plan.bounds)) == expected
    p = make_problem((1, rows), D=D, V=V, dtype=dtype, ignored=0.1, sharpness=2.0)
    problem, targets, lam = arguments(p)
    wide = [tensor.detach().double().requires_grad_() for tensor in (p.hidden, p.weight, p.bias)]
    loss = reference_linear_task_cross_entropy(
        *wide[:2], *p.tensors[2:4], lam, bias=wide[2], aggregation="sum", logit_softcap=3.0, z_loss=0.01
    ).loss
    wanted = torch.autograd.grad(loss, wide)
    every, spec = (True,) * 3, TokenLoss(softcap=3.0, z_loss=0.01)
    out = cuda_on_cpu.linear_forward(problem, targets.tasks_M, lam, every, spec, chunk)
    found = [out.grad_hidden_MD, out.grad_weight_VD, out.grad_bias_V]
    _, _, stats = cuda_on_cpu.linear_rows_forward(problem, spec, chunk)
    grad_M = lam[targets.tasks_M]
    again = cuda_on_cpu.linear_rows_backward(problem, grad_M, stats, None, every, spec, chunk, torch.float32)
    for one, two, exact in zip(found, again, wanted, strict=True):
        exact = exact.reshape(one.shape)
        # Two roundings: that of the gradient of the logits, which the products read, and that of the result.
        assert error(one, exact) <= torch.finfo(dtype).eps + FP32
        assert error(two, exact) <= torch.finfo(dtype).eps + FP32


def test_what_waits_is_what_was_taken() -> None:
    """Every element of every row and slice, in the order of the backend, dW overwritten behind each slice."""
    rows, D, V, chunk = 45, 30, 300, 30
    plan = plan_slices(rows, V, chunk, 320, V * D)
    assert plan == Slices(128, 300, 23, 15)  # seven rows between them
    dlogits = torch.arange(rows * V, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(rows, V)
    storage, workspace = torch.zeros(V * D, dtype=torch.bfloat16), torch.zeros(chunk, 320)
    waiting = Waiting(plan, rows, storage, workspace)
    for start in range(0, rows, chunk):
        used = workspace[: min(chunk, rows - start)].view(torch.bfloat16)[:, :V]
        used.copy_(dlogits[start : start + chunk])
        waiting.take(used, start)
    out_NW, logits_AW = slice_buffers(plan, rows, waiting.free, torch.bfloat16)
    assert out_NW.untyped_storage().data_ptr() == workspace.untyped_storage().data_ptr()
    start, stop = plan.again(rows)
    assert logits_AW.shape == (stop - start, 128)
    for index, (first, last) in reversed(list(enumerate(plan.bounds))):
        logits_AW.fill_(math.nan)
        out_NW.fill_(math.nan)
        here = out_NW[:, : last - first]
        waiting.fill(index, here)
        kept = torch.cat([here[:start], here[stop:]]).view(torch.int16)
        wanted = torch.cat([dlogits[:start], dlogits[stop:]])[:, first:last].view(torch.int16)
        assert torch.equal(kept, wanted)
        assert bool(here[start:stop].isnan().all())
        storage[first * D : last * D] = math.nan  # dW of this slice


@pytest.mark.parametrize(("V", "chunk", "slices", "copies"), [(300, 37, 1, [0, 0]), (700, 13, 2, [2] * 4)])
def test_what_lies_in_one_piece_is_not_copied(
    cuda_on_cpu: CudaBackend, monkeypatch: pytest.MonkeyPatch, V: int, chunk: int, slices: int, copies: list[int]
) -> None:
    """The kernel writes a chunk's gradients where they wait; a place in two slices takes a copy for each."""
    p = make_problem((1, 40), D=64, V=V, dtype=torch.bfloat16, ignored=0.0)
    problem, targets, lam = arguments(p)
    taken: list[int] = []
    take = Waiting.take

    def counting(self: Waiting, dlogits_CV: Tensor, start: int) -> None:
        assert len(self.bounds) == slices
        with Copies() as counted:
            take(self, dlogits_CV, start)
        taken.append(counted.number)

    monkeypatch.setattr(Waiting, "take", counting)
    cuda_on_cpu.linear_forward(problem, targets.tasks_M, lam, (True,) * 3, TokenLoss(), chunk)
    assert taken == copies


class Copies(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func == torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


class Nothing(TorchDispatchMode):
    """Copies move nothing: memory is allocated, and nobody writes to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return args[0] if func == torch.ops.aten.copy_.default else func(*args, **(kwargs or {}))


class Counted:
    """Products that only count, in flop."""

    def __init__(self) -> None:
        self.flop = 0

    def wide(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        assert out.shape == (left.shape[0], right.shape[1])
        self.flop += 2 * left.shape[0] * left.shape[1] * right.shape[1]

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        self.wide(left, right, total)

    def rounded(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        self.wide(left, right, out)


# Beside inputs and gradients: the logits of a chunk, dX in float32 until it is returned in the dtype of the inputs (as
# float32 rows are, where slices sum them), and the packed rows, of a chunk or all. Nothing of the size of dW.
@pytest.mark.parametrize(
    ("rows", "forward", "products", "mebibytes"),
    [
        (8192, True, 3 + 3200 / 8192, 501 + 64 + 64 + 8),
        (4096, True, 3, 501 + 32 + 32 + 8),
        (8192, False, 3, 501 + 128 + 64),
    ],
)
def test_costs_at_the_size_of_a_model(rows: int, forward: bool, products: float, mebibytes: int) -> None:
    """At V = 128256, D = 4096 in bfloat16: what docs/kernels.md says."""
    V, D, dtype = 128256, 4096, torch.bfloat16
    counted = Counted()
    backend = CudaBackend(lambda device: WithoutLaunches("cpu"), counted)
    hidden, weight = torch.empty(rows, D, dtype=dtype), torch.empty(V, D, dtype=dtype)
    labels, lam = torch.zeros(rows, dtype=torch.int64), torch.ones(3)
    problem, need = LinearProblem(hidden, weight, None, labels, labels, labels[:1]), (True, True, False)
    peak = Peak()
    with peak, Nothing():
        if forward:
            backend.linear_forward(problem, labels, lam, need, TokenLoss(), 0)
        else:
            grad_M, stats_2M = torch.ones(rows), torch.zeros(2, rows)
            backend.linear_rows_backward(problem, grad_M, stats_2M, None, need, TokenLoss(), 0, dtype)
    assert counted.flop == products * 2 * rows * V * D
    assert abs((peak.bytes - 2 * D * (rows + V)) / 2**20 - mebibytes) < 1
