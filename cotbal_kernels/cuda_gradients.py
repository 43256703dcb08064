"""What the CUDA backend makes of the chunks of a batch: dX, dW and db, in float32, each rounded once.

float16 cannot hold gradients divided by a million tokens. So there the gradient of the logits is lifted by a power of
two before it is rounded, and the products are lowered again: both are exact.
"""

# Shapes: M positions, C rows of one chunk, D hidden width, V vocabulary, B vocabulary rows of one block.

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .cuda_products import Products
from .interface import LinearProblem, Need

# Bound on a block of dW in float32 where it is added to something else, and what its rows are a multiple of.
BLOCK_BYTES, BLOCK_ROWS = 64 * 2**20, 128


class Lift(NamedTuple):
    """A power of two that float16 gradients are multiplied by on the way into a product, and its inverse."""

    up: Tensor
    down: Tensor


class Chunk(NamedTuple):
    start: int  # of the chunk in rows_N
    hidden_CD: Tensor
    logits_CV: Tensor  # float32, without the bias
    dlogits_CV: Tensor  # the same memory, in the dtype of the hidden states
    only: bool  # there is no other chunk


class RowKernels(Protocol):
    """The launch that dX needs; :class:`~cotbal_kernels.cuda_kernels.KernelLibrary` documents it."""

    def scatter_rows(
        self, grad_CD: Tensor, factor: Tensor | None, problem: LinearProblem, start: int, out_MD: Tensor
    ) -> None: ...


class LinearGradients:
    """dX, dW and db over the chunks; one that was not asked for is empty and costs nothing.

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
        self.total_VD: Tensor | None = None  # lifted if float32

    def add(self, chunk: Chunk) -> None:
        """Use the gradient of the logits of ``chunk``, whose memory the next chunk overwrites."""
        if self.need_hidden:
            grad_CD = chunk.hidden_CD.new_empty(chunk.hidden_CD.shape, dtype=torch.float32)
            self.products.wide(chunk.dlogits_CV, self.weight_VD, grad_CD)
            down = None if self.lift is None else self.lift.down
            self.kernels.scatter_rows(grad_CD, down, self.problem, chunk.start, self.hidden_MD)
        if self.need_bias:
            self.sum_bias_V += chunk.dlogits_CV.sum(0, dtype=torch.float32)
        if self.need_weight:
            self._add_to_weight(chunk)

    def _add_to_weight(self, chunk: Chunk) -> None:
        left_VC, right_CD, into = chunk.dlogits_CV.t(), chunk.hidden_CD, self.into
        narrow = self.dtypes[1] != torch.float32
        if into is not None and into.dtype == torch.float32 and self.lift is None:
            self.products.add(into, left_VC, right_CD)
        elif into is not None and (into.dtype == torch.float32 or chunk.only):
            self._add_in_blocks(into, left_VC, right_CD)
        elif into is None and chunk.only and narrow and self.lift is None:
            self.total_VD = torch.empty_like(
                self.weight_VD, dtype=self.dtypes[1], memory_format=torch.contiguous_format
            )
            self.products.rounded(left_VC, right_CD, self.total_VD)
        elif into is None and chunk.only and narrow:
            self.total_VD = self._zeros()
            self._add_in_blocks(self.total_VD, left_VC, right_CD)
        elif self.total_VD is None:
            self.total_VD = self.weight_VD.new_empty(self.weight_VD.shape, dtype=torch.float32)
            self.products.wide(left_VC, right_CD, self.total_VD)
        else:
            self.products.add(self.total_VD, left_VC, right_CD)

    def _add_in_blocks(self, target_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
        """Add a product to ``target_VD`` of any dtype: sum in float32, one rounding, a bounded buffer."""
        for start, stop in _blocks(target_VD):
            block_BD = target_VD.new_empty((stop - start, target_VD.shape[1]), dtype=torch.float32)
            self.products.wide(left_VC[start:stop], right_CD, block_BD)
            target_VD[start:stop].copy_(self._lowered(block_BD).add_(target_VD[start:stop]))

    def rounded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of hidden states, weight and bias, each rounded once to its dtype."""
        bias_V = self._lowered(self.sum_bias_V).to(self.dtypes[2])
        return self.hidden_MD, self._weight(), bias_V

    def _weight(self) -> Tensor:
        total_VD, into = self.total_VD, self.into
        if not self.need_weight or into is not None:
            if into is not None and total_VD is not None:
                for start, stop in _blocks(into):
                    into[start:stop].copy_(self._lowered(total_VD[start:stop]).add_(into[start:stop]))
            return self.weight_VD.new_empty(0, dtype=self.dtypes[1])
        if total_VD is None:  # no row at all
            return self._zeros()
        return self._lowered(total_VD).to(self.dtypes[1]) if total_VD.dtype == torch.float32 else total_VD

    def _zeros(self) -> Tensor:
        return self.weight_VD.new_zeros(self.weight_VD.shape, dtype=self.dtypes[1])

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
