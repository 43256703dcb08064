"""Rows of a chunk from their positions and to them, as csrc/ moves them, on the CPU and as nvcc's PTX."""

import pytest
import torch
from csrc_case import (
    BF16,
    F16,
    F32,
    SENTINEL,
    compiled,  # noqa: F401 (a fixture, "kernels")
    one_thread,  # noqa: F401 (a fixture)
    outside_untouched,
    placed,
)
from cuda_on_cpu import cpu_kernels, find_compiler

from cotbal_kernels.cuda_kernels.library import KernelLibrary
from cotbal_kernels.interface import LinearProblem

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: CXX, g++, c++")

# Rows 2 ... 6 of this list are a chunk of 11 positions; the last two are none, whatever the list says.
ROWS, NUM_ROWS, POSITIONS = torch.tensor([3, 1, 9, 0, 4, 11, 2]), torch.tensor([5]), [9, 0, 4]
# One value; less than an access of 16 bytes; several and a rest; whole ones; more than a turn of the block.
WIDTHS = [1, 3, 100, 128, 4108]


def problem_of(hidden_MD: torch.Tensor) -> LinearProblem:
    return LinearProblem(hidden_MD, hidden_MD, None, ROWS, ROWS, NUM_ROWS)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("misaligned", "pad"), [(0, 8), (1, 8), (0, 3)])
def test_gather(kernels: KernelLibrary, dtype: torch.dtype, width: int, misaligned: int, pad: int) -> None:
    """The same bits, NaN among them; zeros behind the last row, where a NaN would survive a product with 0."""
    _, hidden_MD = placed(11, width, dtype, misaligned=misaligned, pad=pad)
    hidden_MD.copy_(torch.randn(11, width))
    hidden_MD[0, 0], hidden_MD[2] = torch.nan, torch.nan
    out_CD = kernels.gather_rows(problem_of(hidden_MD), 2, 5)
    expected = torch.cat([hidden_MD[POSITIONS], torch.zeros(2, width, dtype=dtype)])
    torch.testing.assert_close(out_CD, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("factor", [None, 2.0**-7 * 1.25])
def test_scatter(kernels: KernelLibrary, dtype: torch.dtype, width: int, factor: float | None) -> None:
    """Multiplied in float32 and rounded once; no other position is written, and nothing around."""
    grad_CD = torch.randn(5, width)
    grad_CD[3:] = torch.nan
    by = None if factor is None else torch.tensor(factor)
    for misaligned in (0, 1):
        whole, out_MD = placed(11, width, dtype, misaligned=misaligned, pad=0)
        kernels.scatter_rows(grad_CD, by, problem_of(out_MD), 2, out_MD)
        expected = torch.full((11, width), SENTINEL, dtype=dtype)
        expected[POSITIONS] = (grad_CD[:3] if by is None else grad_CD[:3] * by).to(dtype)
        assert torch.equal(out_MD, expected)
        assert outside_untouched(whole, out_MD)


def test_rows_beyond_32_bits(kernels: KernelLibrary) -> None:
    """Positions 2^31 + 40 elements apart; the pages between them are never touched."""
    stride = 2**31 + 40
    whole = torch.empty(stride + 300, dtype=BF16)
    hidden_MD = whole.as_strided((2, 300), (stride, 1))
    hidden_MD.copy_(torch.randn(2, 300))
    listed = torch.tensor([1, 0])
    problem = problem_of(hidden_MD)._replace(rows_N=listed, num_rows=torch.tensor([2]))
    assert torch.equal(kernels.gather_rows(problem, 0, 2), hidden_MD[[1, 0]])


def test_what_no_kernel_takes_is_named() -> None:
    hidden_MD = torch.zeros(11, 4)
    with pytest.raises(ValueError, match=r"hidden must have neighbouring columns \(stride 1\), got stride 11"):
        cpu_kernels().gather_rows(problem_of(torch.zeros(4, 11).t()), 2, 5)
    for grad_CD, out_MD in (
        (torch.zeros(5, 4).bfloat16(), hidden_MD),
        (torch.zeros(4, 5).t(), hidden_MD),
        (torch.zeros(5, 4), torch.zeros(4, 11).t()),
    ):
        with pytest.raises(ValueError, match="grad must be contiguous and float32, and out contiguous"):
            cpu_kernels().scatter_rows(grad_CD, None, problem_of(hidden_MD), 2, out_MD)
