"""Where the Triton backend keeps exponentials: its schedule on real addresses, its plans, and their 12 bits."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl
from interpreter import interpreted

from cotbal_kernels import triton_backend
from cotbal_kernels.interface import saved_grad_dtypes
from cotbal_kernels.triton_kernels.head import KeptRows
from cotbal_kernels.triton_kernels.numeric import cap_slope
from cotbal_kernels.triton_kernels.row_scales import Scale
from cotbal_kernels.triton_kernels.slices import Room, Slices, plan_slices
from cotbal_kernels.triton_kernels.twelve_bits import decode, pack, unpack


class Memory:
    """A head that computes nothing: every launch is checked against what the memory holds, byte by byte."""

    def __init__(self, rows: int, vocab_size: int, width: int, elements: int, block: int, dtype: torch.dtype) -> None:
        self.capacity, self.vocab_size, self.width, self.limit = rows, vocab_size, width, elements
        self.cols, self.block, self.keeps_exponentials = 2 * block, block, True
        self.quarters = 3 if dtype == torch.bfloat16 else 4
        self.padded = self.columns((0, vocab_size))
        self.packed_ND = torch.empty(max(1, rows), width, dtype=dtype)
        self.weight_VD, self.targets_M = torch.empty(vocab_size, width, dtype=dtype), torch.zeros(rows)
        self.statistics_bytes, self.kept_bytes = 8, 4
        self.out_VD = torch.empty(vocab_size, width, dtype=saved_grad_dtypes(dtype)[1])
        self.memory: list[torch.Tensor] = []
        self.holder: dict[int, Any] = {}  # 2-byte cell -> what was last written there
        self.kept: list[tuple[int, int]] = []
        self.taken: list[tuple[str, tuple[int, int], tuple[int, int]]] = []

    def wide_bytes(self, wanted: bool, dtype: torch.dtype) -> int:
        return 4 * wanted

    def slices(self, other_bytes: int, storage: int | None) -> Slices:
        room = Room(self.limit, storage, self.quarters, 1)
        self.plan = plan_slices(self.capacity, self.vocab_size, self.cols, room, ALIGN)
        return self.plan

    def workspace(self, rows: int, stride: int) -> torch.Tensor:
        self.memory.append(self.packed_ND.new_empty((rows, stride)))
        used, kept = sum(part.numel() for part in self.memory), self.plan.stored_rows + self.plan.held_rows
        assert used + kept <= max(self.limit, self.capacity * self.cols), "more workspace than allowed"
        return self.memory[-1]

    def columns(self, bounds: tuple[int, int]) -> int:
        return -(-(bounds[1] - bounds[0]) // self.cols) * self.cols

    def cells(self, tensor: torch.Tensor, rows: int, columns: int) -> list[int]:
        """The cells that a kernel touches, from address and strides of what it is given."""
        assert tensor.shape[0] >= rows
        if rows:
            for whole in (*self.memory, self.out_VD):
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

    def write(
        self, window: tuple[int, int], bounds: tuple[int, int], part: torch.Tensor, what: str, quarters: int = 4
    ) -> None:
        """Every row of the window says what it holds of which row and slice."""
        for row in range(window[1]):
            cells = self.cells(part[row : row + 1], 1, self.columns(bounds) * quarters // 4)
            self.holder.update(dict.fromkeys(cells, (what, window[0] + row, bounds)))

    def expect(
        self, window: tuple[int, int], bounds: tuple[int, int], part: torch.Tensor, what: str, quarters: int = 4
    ) -> list[int]:
        found: list[int] = []
        for row in range(window[1]):
            cells = self.cells(part[row : row + 1], 1, self.columns(bounds) * quarters // 4)
            wanted = (what, window[0] + row, bounds)
            assert all(self.holder.get(cell) == wanted for cell in cells), f"not the {what} of this row and slice"
            found += cells
        return found

    def waiting(self, exp: torch.Tensor, index: int, packed: bool) -> tuple[torch.Tensor, int]:
        """Where the exponentials of a slice are, by what ``project`` does with the strides it is given."""
        quarters = self.quarters if packed else 4
        if exp.dim() == 3:
            return exp[index], quarters
        return exp[:, self.plan.bounds[index] * quarters // 4 :], quarters

    def exponentials(self, window: tuple[int, int], out: torch.Tensor, packed: bool, rows: Any) -> KeptRows:
        assert window[1] > 0
        assert packed == (self.quarters < 4 and not self.plan.in_place)
        self.kept.append(window)
        for index, bounds in enumerate(self.plan.ranges()):
            part, quarters = self.waiting(out, index, packed)
            self.write(window, bounds, part, "exponentials", quarters)
        return KeptRows(window, out, torch.empty(1, window[1]), torch.empty(window[1]))

    def forward(self, window: tuple[int, int], rows: Any) -> None:
        assert not self.memory, "its statistics live beside the workspace"
        kept = self.plan.stored_rows + self.plan.held_rows
        assert window == (kept, self.capacity - kept)

    def dlogits(self, kept: KeptRows, index: int, bounds: tuple[int, int], out: torch.Tensor, *_: Any) -> None:
        assert kept.window in self.kept
        assert kept.max_TN.shape[1] == kept.window[1]
        part, quarters = self.waiting(kept.exp, index, not self.plan.in_place)
        read = self.expect(kept.window, bounds, part, "exponentials", quarters)
        self.write(kept.window, bounds, out, "gradient")
        written = self.cells(out, kept.window[1], self.columns(bounds))
        assert self.plan.in_place or not set(read) & set(written)

    def recompute(self, window, bounds, out, *_: Any) -> None:
        self.write(window, bounds, out, "gradient")

    def grad_hidden(self, window, bounds, dlogits, *_: Any) -> None:
        assert dlogits.shape[0] == window[1], "a descriptor reads zeros behind its last row only"
        self.expect(window, bounds, dlogits, "gradient")
        self.taken.append(("hidden", window, bounds))

    def grad_bias(self, window, bounds, dlogits, *_: Any) -> None:
        self.expect(window, bounds, dlogits, "gradient")
        self.taken.append(("bias", window, bounds))

    def grad_weight(self, bounds, dlogits, scale, out_VD, accumulate) -> None:
        window = (0, self.capacity)
        assert dlogits.shape[0] == self.capacity
        read = self.expect(window, bounds, dlogits, "gradient")
        written = self.cells(out_VD[bounds[0] : bounds[1]], bounds[1] - bounds[0], self.width)
        assert not set(read) & set(written), "dW overwrites what the same launch reads"
        self.holder.update(dict.fromkeys(written, ("dW", bounds)))
        self.taken.append(("weight", window, bounds))


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
    fits = rows * (head.padded + 1) <= elements
    assert slices.in_place == fits
    assert not fits or (slices.stored_rows, slices.held_rows) == (0, rows)
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


@pytest.mark.parametrize("workspace", range(0, 60_000, 1500))
@pytest.mark.parametrize("storage", [0, 16_000, 60_800, 80_000, None])
@pytest.mark.parametrize("quarters", [3, 4])
def test_plans_hold_as_many_rows_as_their_memory(workspace: int, storage: int | None, quarters: int) -> None:
    """Counted slice by slice; and there is no room for another block of rows, neither in dW nor in the workspace."""
    rows, vocab_size, cols, statistics, align = 80, 1000, 16, 4, 8
    plan = plan_slices(rows, vocab_size, cols, Room(workspace, storage, quarters, statistics), align)
    stored, held, slices = plan.stored_rows, plan.held_rows, len(plan.ranges())
    again = rows - stored - held
    assert min(stored, held, again) >= 0
    assert max(stop - start for start, stop in plan.ranges()) <= plan.stride
    assert all(stop - start == plan.stride for start, stop in plan.ranges()[:-1])
    if storage is None:
        assert (stored, held, plan.in_place) == (0, 0, False)
        assert plan.stride == cols or rows * plan.stride <= workspace
        return
    padded = -(-vocab_size // cols) * cols
    fits = rows * (padded + statistics) <= workspace
    assert plan.in_place == fits
    if fits:
        assert (stored, held) == (0, rows)
        return
    row_of_dw, row_of_workspace = slices * plan.stride * quarters // 4, padded * quarters // 4 + statistics
    assert stored * row_of_dw <= storage
    used = rows * plan.stride + stored * statistics + held * row_of_workspace
    assert used <= workspace or (plan.stride == cols and stored == held == 0)
    if again:
        assert stored % align == held % align == 0
        assert (stored + align) * row_of_dw > storage or used + align * statistics > workspace
        assert used + align * row_of_workspace > workspace


@pytest.mark.parametrize("rows", [8192, 16_384, 24_000, 32_768, 65_536])
@pytest.mark.parametrize(("vocab_size", "width"), [(128_256, 4096), (239_154, 5120)])
def test_no_other_plan_costs_much_less(rows: int, vocab_size: int, width: int) -> None:
    """Every number of columns and of stored rows: statistics of stored rows may not make slices much narrower."""
    cols, align, statistics = 256, 128, -(-vocab_size // 128) * 2
    workspace = max(2**26, 2**29 - 4 * rows * width) // 2  # what packed rows and dX leave
    room = Room(workspace, vocab_size * width, 3, statistics)

    def cost(slices: int, places: int) -> int:
        return 2 * vocab_size * (rows - places) + 1600 * rows * slices

    best = cost(vocab_size, 0)
    tiles = -(-vocab_size // cols)
    for columns in (cols * count for count in range(1, tiles + 1)):
        slices = -(-vocab_size // columns)
        for stored in range(0, rows, align):
            left = workspace - rows * columns - stored * statistics
            if left < 0 or stored * slices * columns * 3 // 4 > vocab_size * width:
                break
            held = left // (tiles * cols * 3 // 4 + statistics) // align * align
            best = min(best, cost(slices, min(rows, stored + held)))
    plan = plan_slices(rows, vocab_size, cols, room, align)
    whole = 6 * vocab_size * rows  # the three products
    assert whole + cost(len(plan.ranges()), plan.stored_rows + plan.held_rows) <= 1.01 * (whole + best)


@triton.jit
def _slopes(z_ptr, out_ptr, softcap, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, cap_slope(tl.load(z_ptr + at), softcap))


def test_slopes_of_a_soft_cap_are_never_negative() -> None:
    """Times an exponential they are what is packed, which has no sign. A GPU's 1 / softcap is off by two units."""
    softcap = 30.0
    z = torch.tensor([-softcap * (1 + 2.0**-21), -softcap, 0.0, 15.0, softcap, softcap * (1 + 2.0**-22), 3.0, -29.0])
    out = torch.empty_like(z)
    with interpreted():
        _slopes[(1,)](z, out, softcap, 8)
    torch.testing.assert_close(out, (1 - (z / softcap).square()).clamp(min=0), rtol=1e-5, atol=3e-7)
    assert float(out.min()) == 0


@triton.jit
def _there_and_back(exp_ptr, words_ptr, out_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    first, second, third = pack(tl.load(exp_ptr + row * COLS + tl.arange(0, COLS)[None, :]), ROWS, COLS)
    QUARTER: tl.constexpr = COLS // 4
    quarter = tl.arange(0, QUARTER)[None, :]
    at = words_ptr + row * (3 * QUARTER) + quarter
    tl.store(at, first)
    tl.store(at + QUARTER, second)
    tl.store(at + 2 * QUARTER, third)
    codes = unpack(tl.load(at), tl.load(at + QUARTER), tl.load(at + 2 * QUARTER))
    for index in tl.static_range(4):
        tl.store(out_ptr + row * COLS + index * QUARTER + quarter, decode(codes[index]))


def test_twelve_bits_keep_what_bfloat16_keeps() -> None:
    """Eight digits of every value in (2^-32, 1], rounded to nearest; what is smaller is nothing."""
    rows, cols, blocks = 16, 128, 40
    rng = np.random.default_rng(0)
    values = np.exp2(rng.uniform(-34, 0, rows * cols * blocks)).astype(np.float32)
    edges = [0.0, 1.0, 1 - 2.0**-24, 1 - 2.0**-9, 2.0**-32, 2.0**-33, 2.0**-140]
    edges += [2.0**-32 * (1 + step / 256) for step in range(8)]  # around the smallest, ties among them
    values[rng.permutation(values.size)[: len(edges)]] = edges
    exp = torch.from_numpy(values).view(-1, cols)
    words, out = torch.empty(exp.shape[0], 3 * cols // 4, dtype=torch.int16), torch.empty_like(exp)
    with interpreted():
        _there_and_back[(blocks,)](exp, words, out, rows, cols)
    fraction, exponent = np.frexp(values.astype(np.float64))
    rounded = np.ldexp(np.floor(fraction * 256 + 0.5) / 256, exponent)
    expected = np.where(rounded > 2.0**-32 * (1 + 2.0**-7), rounded, 0)
    np.testing.assert_array_equal(out.view(-1).numpy(), expected)
