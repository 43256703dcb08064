"""Parts of the Triton backend: sums per task, scales of rows, windows of rows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from interpreter import interpreted
from triton_on_cpu import INTERPRETED

from cotbal_kernels.triton_kernels import configs
from cotbal_kernels.triton_kernels.dlogits import dlogits_kernel
from cotbal_kernels.triton_kernels.logits import logits_backward_kernel, logits_forward_kernel
from cotbal_kernels.triton_kernels.project import project_kernel
from cotbal_kernels.triton_kernels.row_losses import row_losses_kernel
from cotbal_kernels.triton_kernels.row_scales import Scale
from cotbal_kernels.triton_kernels.slices import window_rows


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


@pytest.mark.parametrize(
    ("capacity", "limit", "rows"),
    [(0, 500, 1), (50, 5, 5), (3, 5, 3), (50, 17, 16), (50, 0, 1), (50, 10**12, 50)],
)
def test_windows_of_few_rows(capacity: int, limit: int, rows: int) -> None:
    assert window_rows(capacity, limit, 24, configs.INTERPRETED.grad_hidden, 3) == rows
