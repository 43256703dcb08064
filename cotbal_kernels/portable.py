"""The portable backend: chunks of rows in plain PyTorch, for the CPU and for any device without Triton.

For each chunk of at most C computed rows one float32 buffer of C x V logits is turned in place into
exponentials and then into the gradient of the logits, and the two gradient products are taken from it. So the
M x V logits never exist, and the workspace is ``WORKSPACE_BYTES`` whatever M and V are (one row at least), and as much
for a widened block of a 16-bit weight.

Numerics: 16-bit inputs are widened to float32 (exact) before every product, the weight a block of vocabulary
rows at a time; softmax, target subtraction and reductions are float32; dX and dW are rounded once, from a
float32 accumulator (an extra V x D in float32 when the weight is 16-bit). float64 inputs are computed in
float64, which is what gradient checks need. Every reduction has a fixed order: results are bitwise
reproducible for one ``chunk_size`` and one number of threads.

The rows without a target are compacted away before any product. How many are left is known to a CPU; elsewhere
it would have to be read back to the host, so there the capacity (``max_tokens``) is computed, and what lies
behind the last row is written to a spare one.
"""

# Shapes: M positions, N computed rows, C rows of one chunk, D hidden width, V vocabulary, K tasks,
# B vocabulary rows of one block.

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .interface import LinearOutput, LinearProblem, Need, Targets, TokenLoss, compute_dtype, saved_grad_dtypes
from .per_task import task_scales as task_scales
from .per_task import task_sums as task_sums
from .portable_softmax import Rows, logits_to_gradient, row_losses, scale_and_cap
from .rows import at_rows, on_cpu
from .validation import check_capacity, check_target_values, checks_requested

# Bound on the float32 logits of one chunk, and on one widened block of the weight.
WORKSPACE_BYTES = 128 * 2**20
# Rows whose softmax is taken at once on a CPU, in bytes of float32 logits: they and their probabilities stay in
# the cache, and an operation is still long beside the start of its threads.
CACHE_BYTES = 2**21


def prepare_targets(
    labels_M: Tensor,
    task_ids_M: Tensor,
    task_weights_K: Tensor,
    vocab_size: int,
    ignore_index: int,
    skip_zero: bool,
    check: bool,
    capacity: int,
) -> Targets:
    """Compaction by a running count: static shapes, nothing read back to the host.

    On a CPU, or when checks are requested, a value out of range raises instead of poisoning the loss.
    """
    num_tasks = task_weights_K.shape[0]
    supervised_M = labels_M != ignore_index
    raises = on_cpu(labels_M) or checks_requested(check)
    if raises:
        check_target_values(labels_M, task_ids_M, task_weights_K, supervised_M, vocab_size)
    tasks_M = task_ids_M.clamp(0, num_tasks - 1)
    targets_M = labels_M.clamp(0, vocab_size - 1)
    right_M = (tasks_M == task_ids_M) & (targets_M == labels_M)
    right_K = torch.isfinite(task_weights_K) & (task_weights_K >= 0)
    # Integers: a scatter is exact and reproducible here.
    tokens_K = torch.zeros(num_tasks, dtype=torch.int64, device=labels_M.device)
    tokens_K.scatter_add_(0, tasks_M, supervised_M.to(torch.int64))
    computed_M = supervised_M
    if skip_zero:
        computed_M = computed_M & (task_weights_K != 0)[tasks_M]
    rows_N, num_rows = _compact(computed_M, capacity)
    if raises:
        check_capacity(num_rows, capacity)
    right = (right_M | ~supervised_M).all() & right_K.all() & (num_rows <= capacity).all()
    poison = torch.where(right, 0.0, math.nan).to(torch.float32)
    return Targets(targets_M.masked_fill(~computed_M, -1), tasks_M, tokens_K, poison, rows_N, num_rows)


def _compact(computed_M: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Positions of the true entries in order, then M up to the capacity; and their number ``[1]``."""
    size = computed_M.shape[0]
    place_M = computed_M.cumsum(0) - 1
    # Whatever has no place of its own goes to one behind the last, which is cut off.
    place_M = torch.where(computed_M & (place_M < capacity), place_M, capacity)
    rows_N = torch.full((capacity + 1,), size, dtype=torch.int64, device=computed_M.device)
    rows_N.scatter_(0, place_M, torch.arange(size, device=computed_M.device))
    return rows_N[:-1].clone(), computed_M.sum(0, keepdim=True)


class _Results:
    """Loss, hit and statistics of every position, 0 where a position is not computed."""

    def __init__(self, targets_M: Tensor, wide: torch.dtype) -> None:
        size = _with_spare(targets_M)
        self.loss_M = targets_M.new_zeros(size, dtype=wide)
        self.hit_M = targets_M.new_zeros(size)
        self.stats_2M = targets_M.new_zeros((2, size), dtype=wide)
        self._positions = targets_M.shape[0]

    def put(self, rows_B: Tensor, rows: Rows) -> None:
        self.loss_M[rows_B] = rows.loss_B
        self.hit_M[rows_B] = rows.hit_B.to(torch.int64)
        self.stats_2M[0, rows_B] = rows.max_B
        self.stats_2M[1, rows_B] = rows.log_sum_B

    def of_positions(self) -> tuple[Tensor, Tensor, Tensor]:
        end = self._positions
        return self.loss_M[:end], self.hit_M[:end], self.stats_2M[:, :end].contiguous()


class _LinearGradients:
    """dX, dW and db, accumulated over chunks; one that was not asked for is empty and costs nothing.

    ``into`` takes the place of dW: the sum is added to what it holds, in float32, and rounded once.
    """

    def __init__(
        self,
        problem: LinearProblem,
        need: Need,
        dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
        into: Tensor | None = None,
    ) -> None:
        hidden_MD, weight_VD, *_ = problem
        wide = compute_dtype(hidden_MD.dtype)
        self.need_hidden, self.need_weight, self.need_bias = need
        self.dtypes, self.weight_VD, self.into = dtypes, weight_VD, into
        size = _with_spare(problem.targets_M)
        self.positions = hidden_MD.shape[0]
        self.hidden_MD = hidden_MD.new_zeros((size, hidden_MD.shape[1]) if self.need_hidden else (0,), dtype=dtypes[0])
        self.sum_weight_VD = into if into is not None and into.dtype == wide else None
        self.sum_bias_V = weight_VD.new_zeros(weight_VD.shape[:1] if self.need_bias else (0,), dtype=wide)

    def add(self, rows_C: Tensor, hidden_CD: Tensor, dlogits_CV: Tensor) -> None:
        if self.need_hidden:
            _put_rows(self.hidden_MD, rows_C, _product_with_weight(dlogits_CV, self.weight_VD))
        if self.need_weight:
            if self.sum_weight_VD is None:  # cheaper than adding to zeros
                self.sum_weight_VD = torch.mm(dlogits_CV.t(), hidden_CD)
            else:
                self.sum_weight_VD.addmm_(dlogits_CV.t(), hidden_CD)
        if self.need_bias:
            self.sum_bias_V += dlogits_CV.sum(0)

    def rounded(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden_MD[: self.positions], self._weight(), self.sum_bias_V.to(self.dtypes[2])

    def _weight(self) -> Tensor:
        total_VD, into = self.sum_weight_VD, self.into
        if not self.need_weight or into is not None:
            if into is not None and total_VD is not None and total_VD is not into:
                into.copy_(into + total_VD)  # in the wider dtype of the two
            return self.weight_VD.new_zeros(0, dtype=self.dtypes[1])
        if total_VD is None:  # no row at all
            return torch.zeros_like(self.weight_VD, dtype=self.dtypes[1])
        return total_VD.to(self.dtypes[1])


def linear_forward(
    problem: LinearProblem,
    tasks_M: Tensor,
    scale_K: Tensor,
    need: Need,
    spec: TokenLoss,
    chunk_size: int,
) -> LinearOutput:
    """1F for the loss and 1F for each of dX and dW."""
    dtype, wide = problem.hidden_MD.dtype, compute_dtype(problem.hidden_MD.dtype)
    results = _Results(problem.targets_M, wide)
    gradients = _LinearGradients(problem, need, saved_grad_dtypes(dtype))
    scale_M = scale_K[tasks_M].to(wide)
    for rows_C, hidden_CD, logits_CV in _chunks(problem, chunk_size):
        scale_C = at_rows(scale_M, rows_C) if any(need) else None
        _softmax_in_blocks(logits_CV, rows_C, problem.targets_M, scale_C, spec, results)
        if any(need):
            gradients.add(rows_C, hidden_CD, logits_CV)
    loss_M, hit_M, stats_2M = results.of_positions()
    task_loss_K, task_correct_K = task_sums(loss_M, hit_M, tasks_M, scale_K.shape[0])
    loss = (scale_K * task_loss_K).sum()
    return LinearOutput(loss, task_loss_K, task_correct_K, stats_2M.sum(0), *gradients.rounded())


def linear_rows_forward(
    problem: LinearProblem,
    spec: TokenLoss,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """1F."""
    results = _Results(problem.targets_M, compute_dtype(problem.hidden_MD.dtype))
    for rows_C, _, logits_CV in _chunks(problem, chunk_size):
        _softmax_in_blocks(logits_CV, rows_C, problem.targets_M, None, spec, results)
    return results.of_positions()


def linear_rows_backward(
    problem: LinearProblem,
    grad_M: Tensor,
    stats_2M: Tensor,
    grad_weight_out: Tensor | None,
    need: Need,
    spec: TokenLoss,
    chunk_size: int,
    grad_hidden_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """1F to compute the logits again, 1F for each of dX and dW."""
    dtype = problem.weight_VD.dtype
    gradients = _LinearGradients(problem, need, (grad_hidden_dtype, dtype, dtype), grad_weight_out)
    for rows_C, hidden_CD, logits_CV in _chunks(problem, chunk_size):
        _gradient_in_blocks(logits_CV, rows_C, problem.targets_M, grad_M, stats_2M, spec)
        gradients.add(rows_C, hidden_CD, logits_CV)
    return gradients.rounded()


def logits_rows_forward(
    logits_MV: Tensor, targets_M: Tensor, spec: TokenLoss, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits are read once and not changed."""
    wide = compute_dtype(logits_MV.dtype)
    results = _Results(targets_M, wide)
    for rows_C in _row_chunks(*_all_rows(targets_M), logits_MV.shape[1], chunk_size, CACHE_BYTES):
        _softmax_in_blocks(_gather(logits_MV, rows_C, wide), rows_C, targets_M, None, spec, results)
    return results.of_positions()


def logits_rows_backward(
    grad_M: Tensor,
    logits_MV: Tensor,
    targets_M: Tensor,
    stats_2M: Tensor,
    spec: TokenLoss,
    chunk_size: int,
    out_MV: Tensor,
) -> None:
    """The logits are read again."""
    wide = compute_dtype(logits_MV.dtype)
    rows_N, num_rows = _all_rows(targets_M)
    if not on_cpu(targets_M):  # one after the other: those that are not computed need a place too
        rows_N = torch.arange(targets_M.shape[0], device=targets_M.device)
    for rows_C in _row_chunks(rows_N, num_rows, logits_MV.shape[1], chunk_size, CACHE_BYTES):
        logits_CV = _gather(logits_MV, rows_C, wide)
        _gradient_in_blocks(logits_CV, rows_C, targets_M, grad_M, stats_2M, spec)
        _put_rows(out_MV, rows_C, logits_CV)
    if on_cpu(targets_M):
        out_MV.index_fill_(0, (targets_M < 0).nonzero()[:, 0], 0)
    else:
        out_MV.masked_fill_((targets_M < 0)[:, None], 0)


def scale_gradient(grad: Tensor, factor: Tensor, out: Tensor) -> None:
    """The product is float32 on every device, whatever type promotion does with a 0-dimensional factor.

    Blocks of rows keep the widened copy within the workspace.
    """
    if out is grad and on_cpu(factor) and factor.item() == 1:
        return
    wide = compute_dtype(grad.dtype)
    factor = factor.to(wide)
    if grad.dtype == out.dtype == wide:
        torch.mul(grad, factor, out=out)
        return
    for start, stop in _blocks(grad.shape[0], grad[0].numel() if grad.shape[0] else 1):
        out[start:stop] = grad[start:stop].to(wide) * factor


def _with_spare(targets_M: Tensor) -> int:
    """Positions, and one more to write to for the rows that are none where their number is not known here."""
    return targets_M.shape[0] + (not on_cpu(targets_M))


def _all_rows(targets_M: Tensor) -> tuple[Tensor, Tensor]:
    return _compact(targets_M >= 0, targets_M.shape[0])


def _row_chunks(
    rows_N: Tensor, num_rows: Tensor, vocab_size: int, chunk_size: int, limit: int | None = None
) -> Iterator[Tensor]:
    """Yield at most C row indices at a time: those that exist on a CPU, up to the capacity elsewhere."""
    if on_cpu(rows_N):
        rows_N = rows_N[: int(num_rows)]
    else:
        limit = None  # launches cost more than passes over memory
    size = chunk_size or max(1, (limit or WORKSPACE_BYTES) // (4 * vocab_size))
    for start in range(0, rows_N.shape[0], size):
        yield rows_N[start : start + size]


def _chunks(problem: LinearProblem, chunk_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the indices, the widened hidden states and the logits of some rows, all logits in the same memory."""
    hidden_MD, weight_VD, bias_V, _, rows_N, num_rows = problem
    buffer_CV: Tensor | None = None
    for rows_C in _row_chunks(rows_N, num_rows, weight_VD.shape[0], chunk_size):
        hidden_CD = _gather(hidden_MD, rows_C, compute_dtype(hidden_MD.dtype))
        if buffer_CV is None:  # the first chunk is the largest
            buffer_CV = hidden_CD.new_empty(rows_C.shape[0], weight_VD.shape[0])
        logits_CV = buffer_CV[: rows_C.shape[0]]
        _project(hidden_CD, weight_VD, bias_V, logits_CV)
        yield rows_C, hidden_CD, logits_CV


def _gather(source_MX: Tensor, rows_C: Tensor, wide: torch.dtype) -> Tensor:
    """Rows of a chunk in float32, a copy; zeros behind the last one, where a NaN would survive a factor of 0."""
    if on_cpu(source_MX):
        return source_MX.index_select(0, rows_C).to(wide)  # whole rows: faster than an index
    last = source_MX.shape[0] - 1
    return source_MX[rows_C.clamp(max=last)].to(wide).masked_fill_((rows_C > last)[:, None], 0)


def _put_rows(out_MX: Tensor, rows_C: Tensor, values_CX: Tensor) -> None:
    """``out[rows] = values``; on a CPU consecutive rows are one copy, several times as fast as an index."""
    if on_cpu(rows_C) and int(rows_C[-1]) - int(rows_C[0]) + 1 == rows_C.shape[0]:
        out_MX[int(rows_C[0]) : int(rows_C[-1]) + 1] = values_CX
    else:
        out_MX[rows_C] = values_CX.to(out_MX.dtype)


def _blocks(size: int, row_numel: int, limit: int = WORKSPACE_BYTES) -> Iterator[tuple[int, int]]:
    """Split ``size`` rows so that one block of them in float32 fits ``limit`` bytes."""
    step = max(1, limit // (4 * max(1, row_numel)))
    for start in range(0, size, step):
        yield start, min(start + step, size)


def _project(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, logits_CV: Tensor) -> None:
    """Logits ``hidden @ weight.T + bias``, products and sums in the dtype of ``hidden_CD``."""
    for start, stop in _blocks(*weight_VD.shape):
        weight_BD = weight_VD[start:stop].to(hidden_CD.dtype)
        torch.mm(hidden_CD, weight_BD.t(), out=logits_CV[:, start:stop])
    if bias_V is not None:
        logits_CV.add_(bias_V)


def _product_with_weight(dlogits_CV: Tensor, weight_VD: Tensor) -> Tensor:
    """``dlogits @ weight``: the gradient of the hidden rows, accumulated over vocabulary blocks."""
    grad_CD = dlogits_CV.new_zeros(dlogits_CV.shape[0], weight_VD.shape[1])
    for start, stop in _blocks(*weight_VD.shape):
        grad_CD.addmm_(dlogits_CV[:, start:stop], weight_VD[start:stop].to(dlogits_CV.dtype))
    return grad_CD


def _softmax_in_blocks(
    logits_CV: Tensor,
    rows_C: Tensor,
    targets_M: Tensor,
    scale_C: Tensor | None,
    spec: TokenLoss,
    results: _Results,
) -> None:
    """Put losses and statistics of the rows into ``results``; with a scale turn the logits into its gradient."""
    for start, stop in _cache_blocks(logits_CV):
        rows_B, logits_BV = rows_C[start:stop], logits_CV[start:stop]
        targets_B = _targets_at(targets_M, rows_B)
        scale_and_cap(logits_BV, spec)
        probs_BV = torch.softmax(logits_BV, dim=1)
        rows = row_losses(logits_BV, probs_BV, targets_B, spec)
        results.put(rows_B, rows)
        if scale_C is not None:
            lse_B = rows.max_B + rows.log_sum_B
            logits_to_gradient(logits_BV, probs_BV, targets_B, scale_C[start:stop], lse_B, spec)


def _gradient_in_blocks(
    logits_CV: Tensor, rows_C: Tensor, targets_M: Tensor, grad_M: Tensor, stats_2M: Tensor, spec: TokenLoss
) -> None:
    """Turn the logits into their gradient, with the statistics of a softmax that may be over more than these."""
    for start, stop in _cache_blocks(logits_CV):
        rows_B, logits_BV = rows_C[start:stop], logits_CV[start:stop]
        max_B, log_sum_B = at_rows(stats_2M[0], rows_B), at_rows(stats_2M[1], rows_B)
        scale_and_cap(logits_BV, spec)
        # The largest first: both differences are small, whatever offset the logits have.
        probs_BV = (logits_BV - max_B[:, None]).sub_(log_sum_B[:, None]).exp_()
        if not on_cpu(rows_B):  # behind the last row the statistics are none and the logits are the bias
            probs_BV.masked_fill_((rows_B >= targets_M.shape[0])[:, None], 0)
        scale_B = at_rows(grad_M, rows_B).to(logits_BV.dtype)
        logits_to_gradient(logits_BV, probs_BV, _targets_at(targets_M, rows_B), scale_B, max_B + log_sum_B, spec)


def _cache_blocks(logits_CV: Tensor) -> Iterator[tuple[int, int]]:
    """A few rows at a time on a CPU, so that their several passes find them in the cache."""
    rows, vocab_size = logits_CV.shape
    return _blocks(rows, vocab_size, CACHE_BYTES if on_cpu(logits_CV) else WORKSPACE_BYTES)


def _targets_at(targets_M: Tensor, rows_B: Tensor) -> Tensor:
    return targets_M[rows_B.clamp(max=targets_M.shape[0] - 1)]
