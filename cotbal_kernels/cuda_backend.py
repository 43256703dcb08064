"""The CUDA backend: chunks of rows, library products, and the kernels of csrc/ in between.

For each chunk of C packed rows: gather C rows of the hidden states; logits = one library product, float32 out of
16-bit inputs; ``chunk_gradient`` turns the logits into their gradient in place (16-bit values at the front of each
float32 row); two more products give dX and dW. Nothing is read back to the host: the number of chunks comes from the
capacity ``rows_N.shape[0]``, and rows behind the last computed one have zero hidden states and zero gradients.

Workspace: ``WORKSPACE_BYTES`` for the logits of a chunk, whatever M and V are (one row at least), and beside them its
hidden rows and its dX, 6 C D bytes in 16 bits. With several chunks a 16-bit dW is summed in float32, which is 4 V D
bytes more until it is rounded once; with one chunk, or into a float32 ``grad_weight_out``, there is no such buffer.

Numerics: products accumulate in float32; loss, softmax and p - 1 in float32; the gradient of the logits is rounded
once to the dtype of the inputs before the two products, as in every 16-bit training. float16 cannot hold gradients
divided by a million tokens: there they are lifted by a power of two, exactly, and the products lowered again.
float32 products follow ``torch.backends.cuda.matmul.allow_tf32``; float64 goes to the portable backend.
"""

# Shapes: M positions, N rows that may be computed, C rows of one chunk, D hidden width, V vocabulary, K tasks.

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from . import portable
from .cuda_gradients import Chunk, LinearGradients, lift_for
from .cuda_kernels import ChunkRows, RowResults, load
from .cuda_products import LibraryProducts, Products
from .interface import LinearOutput, LinearProblem, Need, Targets, TokenLoss, saved_grad_dtypes
from .rows import at_rows
from .validation import check_capacity, check_target_values, checks_requested

# Bound on the float32 logits of a chunk.
WORKSPACE_BYTES = 512 * 2**20
# Rows of a default chunk and floats of a row of logits: whole tiles of a product, and 16-byte boundaries.
ROW_MULTIPLE, COLUMN_MULTIPLE = 128, 32


class Kernels(Protocol):
    """The launches the backend needs; :class:`~cotbal_kernels.cuda_kernels.KernelLibrary` documents them."""

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

    def task_sums(self, loss_M: Tensor, hit_M: Tensor, tasks_M: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]: ...

    def scale_gradient(self, grad: Tensor, factor: Tensor, out: Tensor) -> None: ...

    def compact(
        self,
        labels_M: Tensor,
        task_ids_M: Tensor,
        task_weights_K: Tensor,
        vocab_size: int,
        ignore_index: int,
        skip_zero: bool,
        capacity: int,
    ) -> Targets: ...

    def task_scales(
        self, task_weights_K: Tensor, tokens_K: Tensor, poison: Tensor, normalizer: Tensor | None, per_task: bool
    ) -> tuple[Tensor, Tensor]: ...

    def gather_rows(self, problem: LinearProblem, start: int, rows: int) -> Tensor: ...

    def scatter_rows(
        self, grad_CD: Tensor, factor: Tensor | None, problem: LinearProblem, start: int, out_MD: Tensor
    ) -> None: ...


class CudaBackend:
    """:class:`~cotbal_kernels.interface.Backend` over kernels and products; it holds no state.

    Args:
        kernels: returns the launches for a device; called when an op runs, so that compiling csrc/ waits until then.
        products: the matrix products.
    """

    def __init__(self, kernels: Callable[[torch.device], Kernels], products: Products) -> None:
        self._kernels, self._products = kernels, products

    def prepare_targets(
        self,
        labels_M: Tensor,
        task_ids_M: Tensor,
        task_weights_K: Tensor,
        vocab_size: int,
        ignore_index: int,
        skip_zero: bool,
        check: bool,
        capacity: int,
    ) -> Targets:
        """One launch."""
        raises = checks_requested(check)
        if raises:
            check_target_values(labels_M, task_ids_M, task_weights_K, labels_M != ignore_index, vocab_size)
        vectors = (labels_M.contiguous(), task_ids_M.contiguous(), task_weights_K.contiguous())
        out = self._kernels(labels_M.device).compact(*vectors, vocab_size, ignore_index, skip_zero, capacity)
        if raises:
            check_capacity(out.num_rows, capacity)
        return out

    def task_scales(
        self, task_weights_K: Tensor, tokens_K: Tensor, poison: Tensor, normalizer: Tensor | None, per_task: bool
    ) -> tuple[Tensor, Tensor]:
        """One launch."""
        normalizer = normalizer if normalizer is None else normalizer.contiguous()
        kernels = self._kernels(task_weights_K.device)
        return kernels.task_scales(task_weights_K.contiguous(), tokens_K, poison, normalizer, per_task)

    def task_sums(self, loss_M: Tensor, hit_M: Tensor, tasks_M: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
        """One launch."""
        if loss_M.dtype == torch.float64:
            return portable.task_sums(loss_M, hit_M, tasks_M, num_tasks)
        return self._kernels(loss_M.device).task_sums(loss_M, hit_M, tasks_M, num_tasks)

    def linear_forward(
        self,
        problem: LinearProblem,
        tasks_M: Tensor,
        scale_K: Tensor,
        need: Need,
        spec: TokenLoss,
        chunk_size: int,
    ) -> LinearOutput:
        """Gradients in forward: 1F for the loss and 1F for each of dX and dW, over the capacity."""
        hidden_MD, _, bias_V, targets_M, rows_N, num_rows = problem
        if hidden_MD.dtype == torch.float64:
            return portable.linear_forward(problem, tasks_M, scale_K, need, spec, chunk_size)
        kernels = self._kernels(hidden_MD.device)
        results, stats_2M = _new_results(targets_M)
        lift = lift_for(scale_K, spec.scale) if hidden_MD.dtype == torch.float16 else None
        wanted_K = (scale_K if lift is None else scale_K * lift.up).contiguous() if any(need) else None
        dtypes = saved_grad_dtypes(hidden_MD.dtype)
        gradients = LinearGradients(kernels, self._products, problem, need, dtypes, lift)
        wide_bias_V = _float_vector(bias_V)
        for chunk in self._chunks(kernels, problem, chunk_size):
            where = ChunkRows(rows_N, num_rows, chunk.start, targets_M, tasks_M, wanted_K)
            out_CV = chunk.dlogits_CV if any(need) else None
            kernels.chunk_gradient(chunk.logits_CV, out_CV, wide_bias_V, where, spec, results)
            if any(need):
                gradients.add(chunk)
        task_loss_K, task_correct_K = kernels.task_sums(results.loss_M, results.hit_M, tasks_M, scale_K.shape[0])
        loss = (scale_K * task_loss_K).sum()
        return LinearOutput(loss, task_loss_K, task_correct_K, stats_2M.sum(0), *gradients.rounded())

    def linear_rows_forward(
        self,
        problem: LinearProblem,
        spec: TokenLoss,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """1F over the capacity."""
        hidden_MD, _, bias_V, targets_M, rows_N, num_rows = problem
        if hidden_MD.dtype == torch.float64:
            return portable.linear_rows_forward(problem, spec, chunk_size)
        kernels, wide_bias_V = self._kernels(hidden_MD.device), _float_vector(bias_V)
        results, stats_2M = _new_results(targets_M)
        for chunk in self._chunks(kernels, problem, chunk_size):
            where = ChunkRows(rows_N, num_rows, chunk.start, targets_M, None, None)
            kernels.chunk_gradient(chunk.logits_CV, None, wide_bias_V, where, spec, results)
        return results.loss_M, results.hit_M, stats_2M

    def linear_rows_backward(
        self,
        problem: LinearProblem,
        grad_M: Tensor,
        stats_2M: Tensor,
        grad_weight_out: Tensor | None,
        need: Need,
        spec: TokenLoss,
        chunk_size: int,
        grad_hidden_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """1F to compute the logits again, 1F for each of dX and dW, over the capacity."""
        hidden_MD, _, bias_V, targets_M, rows_N, num_rows = problem
        if hidden_MD.dtype == torch.float64:
            return portable.linear_rows_backward(
                problem, grad_M, stats_2M, grad_weight_out, need, spec, chunk_size, grad_hidden_dtype
            )
        kernels, wide_bias_V = self._kernels(hidden_MD.device), _float_vector(bias_V)
        grad_M = grad_M.to(torch.float32)
        lift = None
        if hidden_MD.dtype == torch.float16:
            # What arrives at a position that is not computed is never looked at, here neither.
            lift = lift_for(at_rows(grad_M, rows_N), spec.scale)
        scale_M = (grad_M if lift is None else grad_M * lift.up).contiguous()
        dtypes = (grad_hidden_dtype, hidden_MD.dtype, hidden_MD.dtype)
        gradients = LinearGradients(kernels, self._products, problem, need, dtypes, lift, grad_weight_out)
        stats_2M = stats_2M.contiguous()
        for chunk in self._chunks(kernels, problem, chunk_size):
            where = ChunkRows(rows_N, num_rows, chunk.start, targets_M, None, scale_M)
            kernels.saved_gradient(chunk.logits_CV, chunk.dlogits_CV, wide_bias_V, where, spec, stats_2M)
            gradients.add(chunk)
        return gradients.rounded()

    def logits_rows_forward(
        self, logits_MV: Tensor, targets_M: Tensor, spec: TokenLoss, chunk_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One launch over all positions: the logits are read once and not changed."""
        if logits_MV.dtype == torch.float64:
            return portable.logits_rows_forward(logits_MV, targets_M, spec, chunk_size)
        results, stats_2M = _new_results(targets_M)
        where = ChunkRows(None, None, 0, targets_M, None, None)
        kernels = self._kernels(logits_MV.device)
        kernels.chunk_gradient(_rows_of_neighbours(logits_MV), None, None, where, spec, results)
        return results.loss_M, results.hit_M, stats_2M

    def logits_rows_backward(
        self,
        grad_M: Tensor,
        logits_MV: Tensor,
        targets_M: Tensor,
        stats_2M: Tensor,
        spec: TokenLoss,
        chunk_size: int,
        out_MV: Tensor,
    ) -> None:
        """One launch over all positions: the logits are read once more."""
        if logits_MV.dtype == torch.float64:
            portable.logits_rows_backward(grad_M, logits_MV, targets_M, stats_2M, spec, chunk_size, out_MV)
            return
        where = ChunkRows(None, None, 0, targets_M, None, grad_M.to(torch.float32).contiguous())
        logits_MV = _rows_of_neighbours(logits_MV)
        kernels = self._kernels(logits_MV.device)
        kernels.saved_gradient(logits_MV, out_MV, None, where, spec, stats_2M.contiguous())

    def scale_gradient(self, grad: Tensor, factor: Tensor, out: Tensor) -> None:
        """One pass, none in place where the factor is 1."""
        if torch.float64 in (grad.dtype, out.dtype):
            portable.scale_gradient(grad, factor, out)
        else:
            self._kernels(grad.device).scale_gradient(grad, factor.to(torch.float32), out)

    def _chunks(self, kernels: Kernels, problem: LinearProblem, chunk_size: int) -> Iterator[Chunk]:
        """Yield the logits of at most C rows at a time, all in the same workspace."""
        hidden_MD, weight_VD = problem.hidden_MD, problem.weight_VD
        hidden_MD = hidden_MD if hidden_MD.stride(1) == 1 else hidden_MD.contiguous()
        problem = problem._replace(hidden_MD=hidden_MD)
        capacity, vocab_size = problem.rows_N.shape[0], weight_VD.shape[0]
        # Rows start at 16-byte boundaries whatever V is.
        stride = -(-vocab_size // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        size = min(chunk_size or default_chunk(capacity, 4 * stride), capacity)
        workspace = torch.empty((size, stride), dtype=torch.float32, device=hidden_MD.device)
        for start in range(0, capacity, max(size, 1)):
            used = workspace[: min(size, capacity - start)]
            hidden_CD = kernels.gather_rows(problem, start, used.shape[0])
            logits_CV, dlogits_CV = used[:, :vocab_size], used.view(hidden_MD.dtype)[:, :vocab_size]
            self._products.wide(hidden_CD, weight_VD.t(), logits_CV)
            yield Chunk(start, hidden_CD, logits_CV, dlogits_CV, size == capacity)


def default_chunk(capacity: int, row_bytes: int) -> int:
    """Rows per chunk within the workspace: all of them if they fit, else equal chunks of whole tiles.

    Another chunk reads the weight and the float32 sum of dW once more, so they are as few as whole tiles allow.
    """
    limit = max(1, WORKSPACE_BYTES // row_bytes)
    if capacity <= limit:
        return max(1, capacity)
    if limit < ROW_MULTIPLE:
        return limit
    rows = limit // ROW_MULTIPLE * ROW_MULTIPLE
    equal = -(-capacity // -(-capacity // rows))
    return -(-equal // ROW_MULTIPLE) * ROW_MULTIPLE


def _new_results(targets_M: Tensor) -> tuple[RowResults, Tensor]:
    """Results, 0 where a position is not computed, and the statistics among them as ``[2, M]``."""
    stats_2M = targets_M.new_zeros((2, targets_M.shape[0]), dtype=torch.float32)
    loss_M = targets_M.new_zeros(targets_M.shape, dtype=torch.float32)
    return RowResults(loss_M, stats_2M[0], stats_2M[1], torch.zeros_like(targets_M)), stats_2M


def _float_vector(bias_V: Tensor | None) -> Tensor | None:
    return None if bias_V is None else bias_V.to(torch.float32).contiguous()


def _rows_of_neighbours(logits_MV: Tensor) -> Tensor:
    """Any row stride is fine, any other column stride is a copy."""
    return logits_MV if logits_MV.stride(1) == 1 else logits_MV.contiguous()


# What the registry knows as "cuda" is this module; cuda_kernels.unavailable_reason says whether it can run.
BACKEND = CudaBackend(load, LibraryProducts())
prepare_targets = BACKEND.prepare_targets
task_scales = BACKEND.task_scales
task_sums = BACKEND.task_sums
linear_forward = BACKEND.linear_forward
linear_rows_forward = BACKEND.linear_rows_forward
linear_rows_backward = BACKEND.linear_rows_backward
logits_rows_forward = BACKEND.logits_rows_forward
logits_rows_backward = BACKEND.logits_rows_backward
scale_gradient = BACKEND.scale_gradient
