"""Parts of the Triton backend: packing of the targets, sums per task, and the memory plan of the kept exponentials."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from interpreter import interpreted
from triton_on_cpu import INTERPRETED

from cotbal_kernels import portable, triton_backend
from cotbal_kernels.interface import saved_grad_dtypes
from cotbal_kernels.triton_kernels import configs
from cotbal_kernels.triton_kernels.dlogits import dlogits_kernel
from cotbal_kernels.triton_kernels.head import KeptStatistics
from cotbal_kernels.triton_kernels.logits import logits_backward_kernel, logits_forward_kernel
from cotbal_kernels.triton_kernels.project import project_kernel
from cotbal_kernels.triton_kernels.row_losses import row_losses_kernel
from cotbal_kernels.triton_kernels.row_scales import Scale
from cotbal_kernels.triton_kernels.slices import Slices, plan_slices, window_rows


@settings(max_examples=15, deadline=None)
@given(
    size=st.integers(0, 100),  # blocks of 32
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    zeros=st.integers(0, 2),
    skip_zero=st.booleans(),
    bound=st.sampled_from([None, 0, 7, 64]),
    wrong=st.sampled_from([None, "label", "task", "weight"]),
    seed=st.integers(0, 1000),
)
def test_prepare_targets_is_numpy(size, ignored, zeros, skip_zero, bound, wrong, seed) -> None:
    """Stable order of the packed rows, counts, what fills the rest, and the poison."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 20, size)
    labels[rng.random(size) < ignored] = -1
    tasks, weights = rng.integers(0, 3, size), rng.random(3).astype(np.float32)
    weights[:zeros] = 0
    capacity = size if bound is None else min(bound, size)
    valid_tasks = tasks.copy()
    if wrong and size:
        {"label": labels, "task": tasks, "weight": weights}[wrong][0] = {"label": 20, "task": -2, "weight": np.inf}[
            wrong
        ]
        valid_tasks = tasks.clip(0, 2)
    found = INTERPRETED.prepare_targets(
        *map(torch.from_numpy, (labels.copy(), tasks.copy(), weights.copy())), 20, -1, skip_zero, False, capacity
    )
    supervised = labels != -1
    computed = supervised & (weights[valid_tasks] != 0) if skip_zero else supervised
    rows = np.flatnonzero(computed)
    assert found.num_rows.tolist() == [len(rows)]
    assert found.rows_N.tolist() == [*rows[:capacity], *[size] * (capacity - len(rows[:capacity]))]
    assert found.targets_M.tolist() == np.where(computed, labels.clip(0, 19), -1).tolist()
    assert found.tasks_M.tolist() == valid_tasks.tolist()
    assert found.tokens_K.tolist() == np.bincount(valid_tasks[supervised], minlength=3).tolist()
    bad = len(rows) > capacity or (labels > 19).any() or (supervised & (tasks < 0)).any() or np.isinf(weights).any()
    assert bool(found.poison.isnan()) == bool(bad)
    assert bad or float(found.poison) == 0


@pytest.mark.parametrize("size", [1, 15, 53])
def test_task_sums_bit_by_bit(size: int) -> None:
    """Sixteen running sums in double precision, then their sum, rounded once: the same bits in numpy."""
    rng = np.random.default_rng(0)
    loss = (rng.random(size) * 10.0 ** rng.integers(-8, 9, size)).astype(np.float32)
    hit, tasks = rng.integers(0, 2, size), rng.integers(0, 4, size)
    sums_K, correct_K = INTERPRETED.task_sums(*map(torch.from_numpy, (loss, hit, tasks)), 5)
    for task in range(5):  # task 4 is absent
        lanes = np.zeros(16)
        for start in range(0, size, 16):
            here = np.where(tasks[start : start + 16] == task, loss[start : start + 16], 0).astype(np.float64)
            lanes[: len(here)] += here
        assert sums_K[task].numpy() == np.float32(lanes.sum())
        assert correct_K[task] == hit[tasks == task].sum()


@settings(max_examples=20, deadline=None)
@given(
    num_tasks=st.sampled_from([1, 3, 300]),  # blocks of 256
    per_task=st.booleans(),
    own=st.booleans(),
    bad=st.sampled_from([None, "poison", -1.0, math.inf, math.nan]),
    seed=st.integers(0, 1000),
)
def test_scales_of_tasks_are_numpy(num_tasks: int, per_task: bool, own: bool, bad: Any, seed: int) -> None:
    """Absent tasks and a normalizer of 0 among them; what is out of range is NaN, in its own task if it is per task."""
    rng = np.random.default_rng(seed)
    weights, tokens = rng.random(num_tasks).astype(np.float32), rng.integers(0, 4, num_tasks)
    given = rng.integers(0, 3, num_tasks if per_task else ()).astype(np.float32)
    if own:
        total = (weights.astype(np.float64) * (tokens > 0 if per_task else tokens)).sum()
        denominator = total * tokens if per_task else np.full(num_tasks, total)
    else:
        if isinstance(bad, float):
            np.atleast_1d(given)[...] = np.where(np.arange(given.size) == 0, bad, given)
        denominator = np.broadcast_to(given.astype(np.float64), num_tasks)
        denominator = np.where((denominator >= 0) & np.isfinite(denominator), denominator, math.nan)
    expected = np.divide(weights, denominator, out=np.zeros(num_tasks), where=denominator != 0)
    if bad == "poison":
        expected = np.where(denominator != 0, math.nan, 0) if not own else np.full(num_tasks, math.nan)
    poison = torch.tensor(math.nan if bad == "poison" else 0.0)
    arguments = (torch.from_numpy(weights), torch.from_numpy(tokens), poison)
    arguments += (None if own else torch.from_numpy(given), per_task)
    for backend in (INTERPRETED, portable):
        scale_K, denominator_K = backend.task_scales(*arguments)
        np.testing.assert_allclose(scale_K.numpy(), expected, rtol=1e-6)
        if bad != "poison" or not own:
            np.testing.assert_allclose(denominator_K.numpy(), denominator, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    size=st.integers(0, 60),  # blocks of 16
    capacity=st.integers(0, 60),
    by_task=st.booleans(),
    exponent=st.integers(-140, 120),
    power=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_scales_of_rows_and_their_unit_are_numpy(size, capacity, by_task, exponent, power, seed) -> None:
    """Only the positions that are rows count, whatever lies at the others; the unit is at least the largest scale."""
    rng = np.random.default_rng(seed)
    capacity = min(capacity, size)
    count = int(rng.integers(0, capacity + 1))
    rows = np.sort(rng.permutation(size)[:count])
    magnitude = 1.0 if power else 1.5
    if by_task:
        source, tasks = np.array([-magnitude, magnitude / 4, math.inf]) * 2.0**exponent, np.full(size, 2)
        tasks[rows] = rng.integers(0, 2, count)
        wanted = source[tasks]
    else:
        source, tasks = np.full(size, math.nan), None
        source[rows] = rng.choice([-magnitude, magnitude / 4], count) * 2.0**exponent
        wanted = source
    wanted = (2 * wanted.astype(np.float32)).astype(np.float32)
    with interpreted():
        scale = Scale.of(
            torch.from_numpy(source).float(),
            None if tasks is None else torch.from_numpy(tasks),
            torch.from_numpy(np.concatenate([rows, np.full(capacity - count, size)])),
            torch.tensor([count]),
            size,
            2.0,
        )
    assert scale.scale_M.numpy()[rows].tolist() == wanted[rows].tolist()
    largest = max([2.0**-100, *np.abs(wanted[rows]).tolist()])
    assert scale.unit_2.tolist() == [2.0 ** math.ceil(math.log2(largest)), 2.0 ** -math.ceil(math.log2(largest))]


def test_any_number_of_positions_is_served_by_one_compiled_kernel() -> None:
    """The rows of the statistics lie at 16-byte boundaries or not, as M has it: no reason to compile again."""
    for kernel in (project_kernel, row_losses_kernel, dlogits_kernel, logits_forward_kernel, logits_backward_kernel):
        any_alignment = {parameter.name for parameter in kernel.params if parameter.do_not_specialize_on_alignment}
        assert any_alignment == {"max_ptr", "log_sum_ptr"}


@pytest.mark.parametrize(
    ("capacity", "limit", "width", "fewest"),
    [
        (8192, 1569, 4096, 8),
        (1966, 1569, 4096, 2),
        (8192, 1323, 3584, 8),
        (16_384, 900, 4096, 19),
        (700, 1569, 4096, 1),
    ],
)
def test_windows_leave_few_programs_idle_in_the_gradient_of_the_hidden_states(capacity, limit, width, fewest) -> None:
    """On 132 multiprocessors: no number of rows within the limit, whole tiles or not, takes fewer rounds."""
    tile, programs = configs.LARGE.grad_hidden, 132

    def rounds(window: int) -> int:
        tiles = [
            math.ceil(min(window, capacity - start) / tile.rows) * math.ceil(width / tile.cols)
            for start in range(0, capacity, window)
        ]
        return sum(math.ceil(count / programs) for count in tiles)

    chosen = window_rows(capacity, limit, width, tile, programs)
    assert chosen <= limit
    assert chosen == capacity or chosen % tile.rows == 0
    assert rounds(chosen) == fewest == min(map(rounds, range(1, limit + 1)))
    assert not any(rounds(more) == fewest for more in range(chosen + tile.rows, min(capacity, limit), tile.rows))


@pytest.mark.parametrize(("capacity", "limit", "rows"), [(0, 500, 1), (50, 5, 5), (3, 5, 3), (50, 17, 16), (50, 0, 1)])
def test_windows_of_few_rows(capacity: int, limit: int, rows: int) -> None:
    assert window_rows(capacity, limit, 24, configs.INTERPRETED.grad_hidden, 3) == rows


class Memory:
    """A head that computes nothing: every launch is checked against what the memory holds, byte by byte."""

    def __init__(self, rows: int, vocab_size: int, width: int, elements: int, block: int, dtype: torch.dtype) -> None:
        self.capacity, self.vocab_size, self.width, self.limit = rows, vocab_size, width, elements
        self.cols, self.block, self.keeps_exponentials = 2 * block, block, True
        self.packed_ND = torch.empty(max(1, rows), width, dtype=dtype)
        self.weight_VD, self.targets_M = torch.empty(vocab_size, width, dtype=dtype), torch.zeros(rows)
        self.statistics_bytes, self.kept_bytes = 8, 4
        self.out_VD = torch.empty(vocab_size, width, dtype=saved_grad_dtypes(dtype)[1])
        self.holder: dict[int, Any] = {}  # 2-byte cell -> what was last written there
        self.kept: list[tuple[int, int]] = []
        self.taken: list[tuple[str, tuple[int, int], tuple[int, int]]] = []

    def wide_bytes(self, wanted: bool, dtype: torch.dtype) -> int:
        return 4 * wanted

    def slices(self, other_bytes: int, storage_rows: int | None) -> Slices:
        assert storage_rows is not None
        self.plan = plan_slices(self.capacity, self.vocab_size, self.cols, self.limit, storage_rows, 1, ALIGN)
        return self.plan

    def workspace(self, rows: int, stride: int) -> torch.Tensor:
        kept = self.plan.stored_rows + self.plan.held_rows
        assert rows * stride + kept <= max(self.limit, self.capacity * self.cols + kept), "more workspace than allowed"
        self.memory = self.packed_ND.new_empty((rows, stride))
        return self.memory

    def cells(self, tensor: torch.Tensor, rows: int, columns: int) -> list[int]:
        """The cells that a kernel touches, from address and strides of what it is given."""
        assert tensor.shape[0] >= rows
        if rows:
            for whole in (self.memory, self.out_VD):
                begin, end = whole.data_ptr(), whole.data_ptr() + whole.numel() * whole.element_size()
                last = tensor.data_ptr() + ((rows - 1) * tensor.stride(0) + columns) * tensor.element_size()
                if begin <= tensor.data_ptr() < end:
                    assert last <= end, "a kernel would write past the end of its memory"
                    break
            else:
                raise AssertionError("neither the workspace nor dW")
        half, per_row = tensor.element_size() // 2, tensor.stride(0) * tensor.element_size() // 2
        first = tensor.data_ptr() // 2
        return [first + row * per_row + cell for row in range(rows) for cell in range(columns * half)]

    def padded(self, bounds: tuple[int, int]) -> int:
        return -(-(bounds[1] - bounds[0]) // self.cols) * self.cols

    def write(self, window: tuple[int, int], bounds: tuple[int, int], part: torch.Tensor, what: str) -> None:
        """Every row of the window says what it holds of which row and slice."""
        for row in range(window[1]):
            cells = self.cells(part[row : row + 1], 1, self.padded(bounds))
            self.holder.update(dict.fromkeys(cells, (what, window[0] + row, bounds)))

    def expect(self, window: tuple[int, int], bounds: tuple[int, int], part: torch.Tensor, what: str) -> list[int]:
        found: list[int] = []
        for row in range(window[1]):
            cells = self.cells(part[row : row + 1], 1, self.padded(bounds))
            wanted = (what, window[0] + row, bounds)
            assert all(self.holder.get(cell) == wanted for cell in cells), f"not the {what} of this row and slice"
            found += cells
        return found

    def exponentials(self, window: tuple[int, int], slices: Slices, views: list[torch.Tensor], rows: Any) -> Any:
        assert window[1] > 0
        self.kept.append(window)
        for bounds, view in zip(slices.ranges(), views, strict=True):
            self.write(window, bounds, view, "exponentials")
        return KeptStatistics(torch.empty(1, window[1]), torch.empty(window[1]))

    def forward(self, window: tuple[int, int], rows: Any) -> None:
        assert not hasattr(self, "memory"), "its statistics live beside the workspace"
        kept = self.plan.stored_rows + self.plan.held_rows
        assert window == (kept, self.capacity - kept)

    def dlogits(self, window, bounds, first_tile, view, statistics, *_: Any) -> None:
        assert window in self.kept
        assert statistics.max_TN.shape[1] == window[1]
        self.expect(window, bounds, view, "exponentials")
        self.write(window, bounds, view, "gradient")
        tiles = sum(-(-(stop - start) // self.block) for start, stop in self.plan.ranges() if stop <= bounds[0])
        assert first_tile == tiles

    def recompute(self, window, bounds, out, *_: Any) -> None:
        self.write(window, bounds, out, "gradient")

    def grad_hidden(self, window, bounds, dlogits, *_: Any) -> None:
        assert dlogits.shape[0] == window[1], "a descriptor reads zeros behind its last row only"
        self.expect(window, bounds, dlogits, "gradient")
        self.taken.append(("hidden", window, bounds))

    def grad_bias(self, window, bounds, dlogits, *_: Any) -> None:
        self.expect(window, bounds, dlogits, "gradient")
        self.taken.append(("bias", window, bounds))

    def grad_weight(self, counts, bounds, parts, scale, out_VD, accumulate) -> None:
        assert sum(counts) == self.capacity
        read: list[int] = []
        for start, rows, part in zip((0, counts[0]), counts, parts, strict=True):
            assert part.shape[0] == rows
            assert part.stride(0) == parts[0].stride(0)
            read += self.expect((start, rows), bounds, part, "gradient")
        written = self.cells(out_VD[bounds[0] : bounds[1]], bounds[1] - bounds[0], self.width)
        assert not set(read) & set(written), "dW overwrites what the same launch reads"
        self.holder.update(dict.fromkeys(written, ("dW", bounds)))
        self.taken.append(("weight", (0, self.capacity), bounds))


ALIGN = 4


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(0, 40),
    vocab_size=st.integers(1, 300),
    width=st.integers(1, 24),
    elements=st.integers(1, 12_000),
    block=st.sampled_from([8, 16, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@example(rows=40, vocab_size=300, width=8, elements=8000, block=8, dtype=torch.bfloat16)  # all three kinds of rows
@example(rows=40, vocab_size=300, width=1, elements=11_500, block=8, dtype=torch.float16)
def test_no_exponential_is_overwritten_before_it_is_used(rows, vocab_size, width, elements, block, dtype) -> None:
    """The schedule of the backend itself, on real addresses, with launches that only look at the memory."""
    head = Memory(rows, vocab_size, width, elements, block, dtype)
    need = (True, True, True)
    results = triton_backend.RowResults.zeros(torch.zeros(rows, dtype=torch.int64))
    scale = Scale(torch.ones(rows), torch.ones(2))
    triton_backend._slices_of_vocabulary(head, need, head.out_VD, results, scale)  # type: ignore[arg-type]
    slices = head.plan
    assert [*slices.bounds] == sorted(set(slices.bounds))
    assert slices.bounds[0] == 0
    assert slices.bounds[-1] == vocab_size
    ratio = 2 if dtype == torch.float16 else 1
    fits = rows * (head.padded((0, vocab_size)) + 1) <= elements
    assert slices.stored_rows == (0 if fits else min(rows, ratio * width))
    assert not fits or slices.held_rows == rows
    # Every row was taken once in every slice, by each gradient.
    for kind in ("hidden", "bias", "weight"):
        taken = [
            (row, bounds)
            for name, (start, count), bounds in head.taken
            if name == kind
            for row in range(start, start + count)
        ]
        assert sorted(taken) == sorted((row, bounds) for row in range(rows) for bounds in slices.ranges())
    # At the end dW is whole: every cell was written by its own slice, and by nobody afterwards.
    for start, stop in slices.ranges():
        cells = head.cells(head.out_VD[start:stop], stop - start, width)
        assert {head.holder[cell] for cell in cells} == {("dW", (start, stop))}


@pytest.mark.parametrize("elements", range(0, 60_000, 1500))
@pytest.mark.parametrize("storage_rows", [0, 16, 100, None])
def test_plans_hold_as_many_rows_as_their_memory(elements: int, storage_rows: int | None) -> None:
    """Counted slice by slice; and no other cut into as many slices holds more rows."""
    rows, vocab_size, cols, statistics, align = 80, 1000, 16, 3, 8
    plan = plan_slices(rows, vocab_size, cols, elements, storage_rows, statistics, align)
    stored, held, slices = plan.stored_rows, plan.held_rows, len(plan.ranges())
    again = rows - stored - held
    assert min(stored, held, again) >= 0
    assert max(stop - start for start, stop in plan.ranges()) <= plan.stride
    if storage_rows is None:
        assert stored == 0
        assert held in (0, rows)
        assert plan.stride == cols or rows * plan.stride <= elements
        return
    used = stored * plan.stride + held * slices * plan.stride + again * plan.stride + (stored + held) * statistics
    assert used <= elements or (plan.stride == cols and held == 0)
    fits = rows * (-(-vocab_size // cols) * cols + statistics) <= elements
    assert (stored, held) == (0, rows) if fits else stored == min(rows, storage_rows)
    assert again == 0 or held % align == 0
    if again:
        block = align * ((slices - 1) * plan.stride + statistics)
        assert used + block > elements, "another block of rows would have had room"
