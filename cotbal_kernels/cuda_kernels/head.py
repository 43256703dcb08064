"""One linear head of the CUDA backend: its logits chunk by chunk of rows, or slice by slice of the vocabulary.

Both are library products with a float32 result, of 16-bit inputs too, and a kernel of csrc/ that turns logits into
their gradient, in place where that does not wait elsewhere: 16-bit values at the front of each float32 row.
"""

# Shapes: M positions, N rows that may be computed, A of them computed again, C rows of one chunk, D hidden width,
# V vocabulary, W columns of a slice.

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..interface import LinearProblem, TokenLoss
from .library import ChunkRows, RowResults
from .products import Products
from .slices import Slices, Waiting, plan_slices, slice_buffers

# Bound on the float32 logits of a chunk.
WORKSPACE_BYTES = 512 * 2**20
# Rows of a default chunk and floats of a row of logits: whole tiles of a product, and 16-byte boundaries.
ROW_MULTIPLE, COLUMN_MULTIPLE = 128, 32


class HeadKernels(Protocol):
    """The launches a head needs; :class:`.library.KernelLibrary` documents them."""

    def chunk_gradient(
        self,
        logits_CV: Tensor,
        out_CV: Tensor | None,
        bias_V: Tensor | None,
        where: ChunkRows,
        spec: TokenLoss,
        results: RowResults,
    ) -> None: ...

    def saved_gradient(
        self,
        logits_CV: Tensor,
        out_CV: Tensor,
        bias_V: Tensor | None,
        where: ChunkRows,
        spec: TokenLoss,
        stats_2M: Tensor,
    ) -> None: ...

    def gather_rows(self, problem: LinearProblem, start: int, rows: int) -> Tensor: ...


class Chunk(NamedTuple):
    """Rows with the whole vocabulary, in memory that the next chunk overwrites."""

    where: ChunkRows
    hidden_CD: Tensor
    logits_CV: Tensor  # float32, without the bias
    dlogits_CV: Tensor  # in the dtype of the hidden states, in the same memory or where they wait

    @property
    def start(self) -> int:
        return self.where.start


class Slice(NamedTuple):
    """All rows with a part of the vocabulary, in memory that the next slice overwrites."""

    first: int  # column
    hidden_ND: Tensor
    dlogits_NW: Tensor


class Head:
    """The head of ``problem``; gradients of its logits are multiplied by ``scale``, see :class:`ChunkRows`."""

    def __init__(
        self,
        kernels: HeadKernels,
        products: Products,
        problem: LinearProblem,
        spec: TokenLoss,
        chunk_size: int,
        tasks_M: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        hidden_MD, self.weight_VD, bias_V, targets_M, rows_N, num_rows = problem
        hidden_MD = hidden_MD if hidden_MD.stride(1) == 1 else hidden_MD.contiguous()
        self.kernels, self.products, self.spec = kernels, products, spec
        self.problem = problem._replace(hidden_MD=hidden_MD)
        self.bias_V = None if bias_V is None else bias_V.to(torch.float32).contiguous()
        self.where = ChunkRows(rows_N, num_rows, 0, targets_M, tasks_M, scale)
        self.dtype, self.rows, self.vocab_size = hidden_MD.dtype, rows_N.shape[0], self.weight_VD.shape[0]
        # Rows start at 16-byte boundaries whatever V is.
        stride = -(-self.vocab_size // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        size = min(chunk_size or default_chunk(self.rows, 4 * stride), self.rows)
        self.workspace_CV = hidden_MD.new_empty((size, stride), dtype=torch.float32)

    def plan(self, storage: int) -> Slices | None:
        """How dW is taken in slices, with ``storage`` 16-bit elements in its memory; None where chunks are as good.

        One chunk has the gradients of all rows, and the sum of a float32 dW over chunks needs no other memory.
        """
        size, stride = self.workspace_CV.shape
        if self.rows <= size or self.dtype == torch.float32:
            return None
        return plan_slices(self.rows, self.vocab_size, size, stride, storage)

    def chunks(self, waiting: Waiting | None = None) -> Iterator[Chunk]:
        """The logits of at most C rows at a time, all in the same workspace."""
        size = self.workspace_CV.shape[0]
        for start in range(0, self.rows, max(size, 1)):
            used = self.workspace_CV[: min(size, self.rows - start)]
            hidden_CD = self.kernels.gather_rows(self.problem, start, used.shape[0])
            logits_CV = used[:, : self.vocab_size]
            self.products.wide(hidden_CD, self.weight_VD.t(), logits_CV)
            place_CV = None if waiting is None else waiting.place(start, used.shape[0])
            dlogits_CV = used.view(self.dtype)[:, : self.vocab_size] if place_CV is None else place_CV
            yield Chunk(self.where._replace(start=start), hidden_CD, logits_CV, dlogits_CV)

    def losses(self, chunk: Chunk, results: RowResults, gradient: bool) -> None:
        """Losses of a chunk, and with ``gradient`` its logits become their gradient."""
        out_CV = chunk.dlogits_CV if gradient else None
        self.kernels.chunk_gradient(chunk.logits_CV, out_CV, self.bias_V, chunk.where, self.spec, results)

    def saved(self, chunk: Chunk, stats_2M: Tensor) -> None:
        """The logits of a chunk become their gradient, from statistics that are known."""
        self.kernels.saved_gradient(chunk.logits_CV, chunk.dlogits_CV, self.bias_V, chunk.where, self.spec, stats_2M)

    def slices(self, plan: Slices, waiting: Waiting | None, stats_2M: Tensor) -> Iterator[Slice]:
        """The gradients of the logits slice by slice, the last slice first: those that wait, and all others again."""
        free = self.workspace_CV.view(-1) if waiting is None else waiting.free
        dlogits_NW, logits_AW = slice_buffers(plan, self.rows, free, self.dtype)
        hidden_ND = self.kernels.gather_rows(self.problem, 0, self.rows)
        start, stop = plan.again(self.rows)
        for index, (first, last) in reversed(list(enumerate(plan.bounds))):
            here_NW = dlogits_NW[:, : last - first]
            if stop > start:
                logits_AC = logits_AW[:, : last - first]
                self.products.wide(hidden_ND[start:stop], self.weight_VD[first:last].t(), logits_AC)
                bias_W = None if self.bias_V is None else self.bias_V[first:last]
                # A target outside of the slice is none of its columns.
                where = self.where._replace(start=start, targets_M=self.where.targets_M - first)
                self.kernels.saved_gradient(logits_AC, here_NW[start:stop], bias_W, where, self.spec, stats_2M)
            if waiting is not None:
                waiting.fill(index, here_NW)
            yield Slice(first, hidden_ND, here_NW)


def default_chunk(capacity: int, row_bytes: int) -> int:
    """Rows per chunk within the workspace: all of them if they fit, else equal chunks of whole tiles.

    Another chunk reads the weight once more, so they are as few as whole tiles allow.
    """
    limit = max(1, WORKSPACE_BYTES // row_bytes)
    if capacity <= limit:
        return max(1, capacity)
    if limit < ROW_MULTIPLE:
        return limit
    rows = limit // ROW_MULTIPLE * ROW_MULTIPLE
    equal = -(-capacity // -(-capacity // rows))
    return -(-equal // ROW_MULTIPLE) * ROW_MULTIPLE
