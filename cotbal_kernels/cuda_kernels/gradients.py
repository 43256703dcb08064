"""What the CUDA backend makes of the chunks of a batch: dX, dW and db, in float32, each rounded once.

float16 cannot hold gradients divided by a million tokens. So there the gradient of the logits is lifted by a power of
two before it is rounded, and the products are lowered again: both are exact.
"""

# Shapes: M positions, C rows of one chunk, D hidden width, V vocabulary, B vocabulary rows of one block.

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..interface import LinearProblem, Need
from .products import Products

# Bound on a block of dW in float32 where it is added to something else, and what its rows are a multiple of.
BLOCK_BYTES, BLOCK_ROWS = 64 * 2**20, 128


class Lift(NamedTuple):
    """A power of two that float16 gradients are multiplied by on the way into a product, and its inverse."""

    up: Tensor
    down: Tensor


class RowKernels(Protocol):
    """The launch that dX needs; :class:`.library.KernelLibrary` documents it."""

    def scatter_rows(
        self, grad_CD: Tensor, factor: Tensor | None, problem: LinearProblem, start: int, out_MD: Tensor
    ) -> None: ...


class LinearGradients:
    """dX, dW and db; one that was not asked for is empty and costs nothing.

    ``into`` takes the place of dW: the sum is added to what it holds, in float32, and rounded once.
    """

    def __init__(
        self,
        kernels: RowKernels,
        products: Products,
        problem: LinearProblem,
        need: Need,
        dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
        lift: Lift | None,
        into: Tensor | None = None,
    ) -> None:
        self.kernels, self.products, self.problem = kernels, products, problem
        self.dtypes, self.lift, self.into = dtypes, lift, into
        self.need_hidden, self.need_weight, self.need_bias = need
        hidden_MD, self.weight_VD = problem.hidden_MD, problem.weight_VD
        self.hidden_MD = hidden_MD.new_zeros(hidden_MD.shape if self.need_hidden else (0,), dtype=dtypes[0])
        bias_shape = self.weight_VD.shape[:1] if self.need_bias else (0,)
        self.sum_bias_V = self.weight_VD.new_zeros(bias_shape, dtype=torch.float32)
        self.sum_ND: Tensor | None = None  # dX of all rows, summed over slices
        self.total_VD: Tensor  # lifted if float32
        if into is not None:
            self.total_VD = into
        else:
            new = hidden_MD.new_empty if problem.rows_N.shape[0] else hidden_MD.new_zeros
            self.total_VD = new(self.weight_VD.shape if self.need_weight else (0,), dtype=dtypes[1])

    def add_rows(self, dlogits_CV: Tensor, start: int) -> None:
        """dX and db of the rows from ``start`` on."""
        if self.need_hidden:
            grad_CD = self._new_rows(dlogits_CV.shape[0])
            self.products.wide(dlogits_CV, self.weight_VD, grad_CD)
            self._scatter(grad_CD, start)
        if self.need_bias:
            self.sum_bias_V += dlogits_CV.sum(0, dtype=torch.float32)

    def add_weight(self, dlogits_RW: Tensor, hidden_RD: Tensor, first: int = 0, begun: bool = False) -> None:
        """dW of the columns from ``first`` on; unless ``begun`` nothing has been added to them before."""
        if not self.need_weight:
            return
        left_WR, target_WD = dlogits_RW.t(), self.total_VD[first : first + dlogits_RW.shape[1]]
        adds = begun or self.into is not None
        in_float32 = target_WD.dtype == torch.float32
        if adds and in_float32 and self.lift is None:
            self.products.add(target_WD, left_WR, hidden_RD)
        elif not adds and in_float32:
            self.products.wide(left_WR, hidden_RD, target_WD)
        elif not adds and self.lift is None:
            self.products.rounded(left_WR, hidden_RD, target_WD)
        else:
            self._add_in_blocks(target_WD, left_WR, hidden_RD, adds)

    def _add_in_blocks(self, target_WD: Tensor, left_WR: Tensor, right_RD: Tensor, adds: bool) -> None:
        """A product into ``target_WD`` of any dtype: sum in float32, one rounding, a bounded buffer."""
        for start, stop in _blocks(target_WD):
            block_BD = target_WD.new_empty((stop - start, target_WD.shape[1]), dtype=torch.float32)
            self.products.wide(left_WR[start:stop], right_RD, block_BD)
            block_BD = self._lowered(block_BD)
            target_WD[start:stop].copy_(block_BD.add_(target_WD[start:stop]) if adds else block_BD)

    def add_slice(self, dlogits_NW: Tensor, first: int) -> None:
        """dX and db of all rows, as far as they come from the columns from ``first`` on."""
        stop = first + dlogits_NW.shape[1]
        if self.need_bias:
            torch.sum(dlogits_NW, 0, dtype=torch.float32, out=self.sum_bias_V[first:stop])
        if self.need_hidden and self.sum_ND is None:
            self.sum_ND = self._new_rows(dlogits_NW.shape[0])
            self.products.wide(dlogits_NW, self.weight_VD[first:stop], self.sum_ND)
        elif self.sum_ND is not None:
            self.products.add(self.sum_ND, dlogits_NW, self.weight_VD[first:stop])

    def rounded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of hidden states, weight and bias, each rounded once to its dtype."""
        if self.sum_ND is not None:
            self._scatter(self.sum_ND, 0)
        bias_V = self._lowered(self.sum_bias_V).to(self.dtypes[2])
        if self.into is not None:
            return self.hidden_MD, self.weight_VD.new_empty(0, dtype=self.dtypes[1]), bias_V
        wide = self.total_VD.dtype == torch.float32
        return self.hidden_MD, self._lowered(self.total_VD) if wide else self.total_VD, bias_V

    def _new_rows(self, rows: int) -> Tensor:
        return self.weight_VD.new_empty((rows, self.weight_VD.shape[1]), dtype=torch.float32)

    def _scatter(self, grad_RD: Tensor, start: int) -> None:
        """dX of the rows from ``start`` on to their positions."""
        down = None if self.lift is None else self.lift.down
        self.kernels.scatter_rows(grad_RD, down, self.problem, start, self.hidden_MD)

    def _lowered(self, lifted: Tensor) -> Tensor:
        """Undo the lift in place."""
        return lifted if self.lift is None else lifted.mul_(self.lift.down)


def lift_for(upstream: Tensor, logit_scale: float) -> Lift | None:
    """Bring the largest factor of a float16 gradient to 8 ... 16.

    Below 6e-5 float16 loses digits, and below 6e-8 everything, while a factor of 1e-6 is usual. Above, 65504 leaves
    room for a z-loss, whose factor 1 + 2 z_loss lse exceeds 1.
    """
    if upstream.numel() == 0:
        return None
    exponent = torch.frexp(upstream.abs().amax() * logit_scale).exponent
    power = (4 - exponent.to(torch.int32)).clamp(-100, 100)
    # A power of two by its bits: exact on every device, which pow need not be.
    up, down = (((sign * power + 127) << 23).view(torch.float32) for sign in (1, -1))
    return Lift(up, down)


def _blocks(matrix_VD: Tensor) -> Iterator[tuple[int, int]]:
    """Split the rows of dW so that a block in float32 fits its bound; starts stay at 16-byte boundaries."""
    size = matrix_VD.shape[0]
    step = max(1, BLOCK_BYTES // (4 * max(1, matrix_VD.shape[1])) // BLOCK_ROWS) * BLOCK_ROWS
    for start in range(0, size, step):
        yield start, min(start + step, size)
