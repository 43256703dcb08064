"""The portable backend: chunks of rows in plain PyTorch, for the CPU and for any device without Triton.

For each chunk of at most C computed rows one float32 buffer of C x V logits is turned in place into
exponentials and then into the gradient of the logits, and the two gradient products are taken from it. So the
M x V logits never exist, and the workspace is ``WORKSPACE_BYTES`` whatever M and V are (one row at least).

Numerics: 16-bit inputs are widened to float32 (exact) before every product, the weight a block of vocabulary
rows at a time; softmax, target subtraction and reductions are float32; dX and dW are rounded once, from a
float32 accumulator (an extra V x D in float32 when the weight is 16-bit). float64 inputs are computed in
float64, which is what gradient checks need. Every reduction has a fixed order: results are bitwise
reproducible for one ``chunk_size`` and one number of threads.

On a CPU the rows without a target are compacted away before any product. On other devices that would read the
row count back to the host, so there they are computed and masked.
"""

# Shapes: M positions, N computed rows, C rows of one chunk, D hidden width, V vocabulary, K tasks,
# B vocabulary rows of one block.

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .per_task import sum_by_task
from .validation import check_target_values, checks_requested

# Bound on the float32 logits of one chunk, and on one widened block of the weight.
WORKSPACE_BYTES = 128 * 2**20


class TokenLoss(NamedTuple):
    """The loss of one token: cross-entropy with options. All zero means plain cross-entropy."""

    softcap: float  # z -> softcap * tanh(z / softcap); 0 is none
    smoothing: float  # share of the target spread evenly over the vocabulary
    z_loss: float  # coefficient of lse^2


class LinearOutput(NamedTuple):
    """What :func:`linear_forward` returns; a gradient that was not asked for is an empty tensor."""

    loss: Tensor
    task_loss_K: Tensor
    task_correct_K: Tensor
    lse_M: Tensor
    grad_hidden_MD: Tensor
    grad_weight_VD: Tensor
    grad_bias_V: Tensor


class _Chunk(NamedTuple):
    """Softmax of one chunk of rows; ``exp_CV`` is the logits buffer, overwritten."""

    exp_CV: Tensor
    sum_C: Tensor
    loss_C: Tensor
    lse_C: Tensor
    hit_C: Tensor
    softcap_slope_CV: Tensor | None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 stays float64, everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def saved_grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which gradients taken in the forward pass wait for the backward pass.

    float16 waits in float32: a gradient divided by 1e6 tokens underflows before the loss scale, which only
    arrives in the backward pass, could lift it.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def prepare_targets(
    labels_M: Tensor,
    task_ids_M: Tensor,
    task_weights_K: Tensor,
    vocab_size: int,
    ignore_index: int,
    skip_zero: bool,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return targets_M (-1: row not computed), tasks_M (in range), tokens_K and the poison scalar.

    The poison is 0.0, or NaN when a value is out of range and raising would synchronise with the host.
    """
    num_tasks = task_weights_K.shape[0]
    supervised_M = labels_M != ignore_index
    if labels_M.device.type == "cpu" or checks_requested(check):
        check_target_values(labels_M, task_ids_M, task_weights_K, supervised_M, vocab_size)
    tasks_M = task_ids_M.clamp(0, num_tasks - 1)
    targets_M = labels_M.clamp(0, vocab_size - 1)
    right_M = (tasks_M == task_ids_M) & (targets_M == labels_M)
    right_K = torch.isfinite(task_weights_K) & (task_weights_K >= 0)
    right = (right_M | ~supervised_M).all() & right_K.all()
    poison = torch.where(right, 0.0, math.nan).to(torch.float32)
    # Integers: a scatter is exact and reproducible here.
    tokens_K = torch.zeros(num_tasks, dtype=torch.int64, device=labels_M.device)
    tokens_K.scatter_add_(0, tasks_M, supervised_M.to(torch.int64))
    computed_M = supervised_M
    if skip_zero:
        computed_M = computed_M & (task_weights_K != 0)[tasks_M]
    return targets_M.masked_fill(~computed_M, -1), tasks_M, tokens_K, poison


class _RowResults:
    """Loss, lse and argmax hit of every row, 0 where a row is not computed."""

    def __init__(self, targets_M: Tensor, wide: torch.dtype) -> None:
        self.loss_M = torch.zeros_like(targets_M, dtype=wide)
        self.lse_M = torch.zeros_like(targets_M, dtype=wide)
        self.hit_M = torch.zeros_like(targets_M)

    def put(self, rows_C: Tensor, chunk: _Chunk, computed_C: Tensor) -> None:
        self.loss_M[rows_C] = chunk.loss_C.masked_fill(~computed_C, 0)
        self.lse_M[rows_C] = chunk.lse_C.masked_fill(~computed_C, 0)
        self.hit_M[rows_C] = (chunk.hit_C & computed_C).to(torch.int64)


class _LinearGradients:
    """dX, dW and db, accumulated over chunks; one that was not asked for is empty and costs nothing."""

    def __init__(self, hidden_MD: Tensor, weight_VD: Tensor, dtype: torch.dtype, need: Sequence[bool]) -> None:
        wide = compute_dtype(hidden_MD.dtype)
        self.need_hidden, self.need_weight, self.need_bias = need
        self.dtype = dtype
        self.weight_VD = weight_VD
        self.hidden_MD = hidden_MD.new_zeros(hidden_MD.shape if self.need_hidden else (0,), dtype=dtype)
        self.sum_weight_VD = weight_VD.new_zeros(weight_VD.shape if self.need_weight else (0,), dtype=wide)
        self.sum_bias_V = weight_VD.new_zeros(weight_VD.shape[:1] if self.need_bias else (0,), dtype=wide)

    def add(self, rows_C: Tensor, hidden_CD: Tensor, dlogits_CV: Tensor) -> None:
        if self.need_hidden:
            self.hidden_MD[rows_C] = _product_with_weight(dlogits_CV, self.weight_VD).to(self.dtype)
        if self.need_weight:
            self.sum_weight_VD.addmm_(dlogits_CV.t(), hidden_CD)
        if self.need_bias:
            self.sum_bias_V += dlogits_CV.sum(0)

    def rounded(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden_MD, self.sum_weight_VD.to(self.dtype), self.sum_bias_V.to(self.dtype)


def linear_forward(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_M: Tensor,
    tasks_M: Tensor,
    scale_K: Tensor,
    need: Sequence[bool],
    spec: TokenLoss,
    chunk_size: int,
) -> LinearOutput:
    """Loss ``sum_k scale_k S_k`` with the gradients of (hidden, weight, bias) that ``need`` asks for.

    Costs 1F for the loss and 1F for each of dX and dW.
    """
    wide = compute_dtype(hidden_MD.dtype)
    results = _RowResults(targets_M, wide)
    gradients = _LinearGradients(hidden_MD, weight_VD, saved_grad_dtype(hidden_MD.dtype), need)
    for rows_C in _row_chunks(targets_M, weight_VD.shape[0], chunk_size):
        hidden_CD, targets_C, computed_C = _gather(hidden_MD, targets_M, rows_C, wide)
        chunk = _softmax(_project(hidden_CD, weight_VD, bias_V), targets_C, spec, need_grad=any(need))
        results.put(rows_C, chunk, computed_C)
        if any(need):
            scale_C = scale_K[tasks_M[rows_C]].to(wide).masked_fill(~computed_C, 0)
            gradients.add(rows_C, hidden_CD, _dlogits(chunk, targets_C, scale_C, spec))
    task_loss_K = sum_by_task(results.loss_M, tasks_M, scale_K.shape[0])
    task_correct_K = torch.zeros_like(scale_K, dtype=torch.int64).scatter_add_(0, tasks_M, results.hit_M)
    loss = (scale_K * task_loss_K).sum()
    return LinearOutput(loss, task_loss_K, task_correct_K, results.lse_M, *gradients.rounded())


def linear_rows_forward(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_M: Tensor,
    spec: TokenLoss,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, argmax hit (0 or 1) and lse of every row, 0 where not computed: 1F."""
    wide = compute_dtype(hidden_MD.dtype)
    results = _RowResults(targets_M, wide)
    for rows_C in _row_chunks(targets_M, weight_VD.shape[0], chunk_size):
        hidden_CD, targets_C, computed_C = _gather(hidden_MD, targets_M, rows_C, wide)
        chunk = _softmax(_project(hidden_CD, weight_VD, bias_V), targets_C, spec, need_grad=False)
        results.put(rows_C, chunk, computed_C)
    return results.loss_M, results.hit_M, results.lse_M


def linear_rows_backward(
    grad_M: Tensor,
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_M: Tensor,
    need: Sequence[bool],
    spec: TokenLoss,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for any upstream gradient per row: 1F to compute the logits again, 1F for each of dX and dW.

    The softmax is computed again as well: ``exp(z - lse)`` from a saved lse of 1e4 would be off by 1e-3.
    """
    wide = compute_dtype(hidden_MD.dtype)
    gradients = _LinearGradients(hidden_MD, weight_VD, hidden_MD.dtype, need)
    for rows_C in _row_chunks(targets_M, weight_VD.shape[0], chunk_size):
        hidden_CD, targets_C, computed_C = _gather(hidden_MD, targets_M, rows_C, wide)
        chunk = _softmax(_project(hidden_CD, weight_VD, bias_V), targets_C, spec, need_grad=True)
        scale_C = grad_M[rows_C].to(wide).masked_fill(~computed_C, 0)
        gradients.add(rows_C, hidden_CD, _dlogits(chunk, targets_C, scale_C, spec))
    return gradients.rounded()


def logits_rows_forward(
    logits_MV: Tensor, targets_M: Tensor, spec: TokenLoss, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`linear_rows_forward`, for logits that exist; they are read once and not changed."""
    wide = compute_dtype(logits_MV.dtype)
    results = _RowResults(targets_M, wide)
    for rows_C in _row_chunks(targets_M, logits_MV.shape[1], chunk_size):
        logits_CV, targets_C, computed_C = _gather(logits_MV, targets_M, rows_C, wide)
        results.put(rows_C, _softmax(logits_CV, targets_C, spec, need_grad=False), computed_C)
    return results.loss_M, results.hit_M, results.lse_M


def logits_rows_backward(
    grad_M: Tensor, logits_MV: Tensor, targets_M: Tensor, spec: TokenLoss, chunk_size: int
) -> Tensor:
    """Gradient of the logits, rounded once to their dtype; zero rows where not computed."""
    wide = compute_dtype(logits_MV.dtype)
    grad_logits_MV = logits_MV.new_zeros(logits_MV.shape)
    for rows_C in _row_chunks(targets_M, logits_MV.shape[1], chunk_size):
        logits_CV, targets_C, computed_C = _gather(logits_MV, targets_M, rows_C, wide)
        chunk = _softmax(logits_CV, targets_C, spec, need_grad=True)
        scale_C = grad_M[rows_C].to(wide).masked_fill(~computed_C, 0)
        grad_logits_MV[rows_C] = _dlogits(chunk, targets_C, scale_C, spec).to(logits_MV.dtype)
    return grad_logits_MV


def scale_gradient(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``grad * factor`` in ``dtype``, out of place, so that a second backward finds ``grad``
    unchanged.

    The product is float32 on every device, whatever type promotion does with a 0-dimensional factor. Blocks of
    rows keep the widened copy within the workspace.
    """
    out = torch.empty_like(grad, dtype=dtype)
    wide = compute_dtype(grad.dtype)
    for start, stop in _blocks(grad.shape[0], grad[0].numel() if grad.shape[0] else 1):
        out[start:stop] = grad[start:stop].to(wide) * factor.to(wide)
    return out


def _row_chunks(targets_M: Tensor, vocab_size: int, chunk_size: int) -> Iterator[Tensor]:
    """Yield int64 row indices, at most C at a time: those with a target on a CPU, all of them elsewhere."""
    if targets_M.device.type == "cpu":
        rows_N = (targets_M >= 0).nonzero().squeeze(1)
    else:
        rows_N = torch.arange(targets_M.shape[0], device=targets_M.device)
    size = chunk_size or max(1, WORKSPACE_BYTES // (4 * vocab_size))
    for start in range(0, rows_N.shape[0], size):
        yield rows_N[start : start + size]


def _gather(source_MX: Tensor, targets_M: Tensor, rows_C: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a chunk in float32 (a copy), their targets (in range) and whether each is really computed."""
    targets_C = targets_M[rows_C]
    computed_C = targets_C >= 0
    # A masked row may hold anything, NaN included: zero it before it meets a factor of zero.
    source_CX = source_MX[rows_C].to(wide).masked_fill_(~computed_C[:, None], 0)
    return source_CX, targets_C.clamp(min=0), computed_C


def _blocks(size: int, row_numel: int) -> Iterator[tuple[int, int]]:
    """Split ``size`` rows so that one block of them in float32 fits the workspace."""
    step = max(1, WORKSPACE_BYTES // (4 * max(1, row_numel)))
    for start in range(0, size, step):
        yield start, min(start + step, size)


def _project(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Logits ``hidden @ weight.T + bias``, products and sums in the dtype of ``hidden_CD``."""
    logits_CV = hidden_CD.new_empty(hidden_CD.shape[0], weight_VD.shape[0])
    for start, stop in _blocks(*weight_VD.shape):
        weight_BD = weight_VD[start:stop].to(hidden_CD.dtype)
        torch.mm(hidden_CD, weight_BD.t(), out=logits_CV[:, start:stop])
    return logits_CV if bias_V is None else logits_CV.add_(bias_V)


def _product_with_weight(dlogits_CV: Tensor, weight_VD: Tensor) -> Tensor:
    """``dlogits @ weight``: the gradient of the hidden rows, accumulated over vocabulary blocks."""
    grad_CD = dlogits_CV.new_zeros(dlogits_CV.shape[0], weight_VD.shape[1])
    for start, stop in _blocks(*weight_VD.shape):
        grad_CD.addmm_(dlogits_CV[:, start:stop], weight_VD[start:stop].to(dlogits_CV.dtype))
    return grad_CD


def _softmax(logits_CV: Tensor, targets_C: Tensor, spec: TokenLoss, *, need_grad: bool) -> _Chunk:
    """Turn logits into exponentials in place and return the loss of each row.

    The loss is ``log l - (z - m)``, both small, never ``(m + log l) - z``, where a large offset m eats the
    digits.
    """
    slope_CV = None
    if spec.softcap:
        tanh_CV = logits_CV.div_(spec.softcap).tanh_()
        if need_grad:
            slope_CV = 1 - tanh_CV * tanh_CV
        logits_CV = tanh_CV.mul_(spec.softcap)
    max_C, argmax_C = logits_CV.max(dim=1)
    shifted_CV = logits_CV.sub_(max_C[:, None])
    target_C = shifted_CV.gather(1, targets_C[:, None]).squeeze(1)
    mean_C = shifted_CV.mean(1) if spec.smoothing else None
    exp_CV = shifted_CV.exp_()
    sum_C = exp_CV.sum(1)
    log_sum_C = sum_C.log()
    loss_C = log_sum_C - target_C
    if mean_C is not None:
        loss_C = (1 - spec.smoothing) * loss_C + spec.smoothing * (log_sum_C - mean_C)
    lse_C = max_C + log_sum_C
    if spec.z_loss:
        loss_C = loss_C + spec.z_loss * lse_C**2
    return _Chunk(exp_CV, sum_C, loss_C, lse_C, argmax_C == targets_C, slope_CV)


def _dlogits(chunk: _Chunk, targets_C: Tensor, scale_C: Tensor, spec: TokenLoss) -> Tensor:
    """Turn the exponentials into ``scale * d loss / d logits`` in place, all in float32.

    ``p - 1`` at the target is formed here, before any rounding to 16 bits and before the scale.
    """
    factor_C = (1 + 2 * spec.z_loss * chunk.lse_C) / chunk.sum_C
    dlogits_CV = chunk.exp_CV.mul_(factor_C[:, None])
    hot_C1 = dlogits_CV.new_full((targets_C.shape[0], 1), -(1 - spec.smoothing))
    dlogits_CV.scatter_add_(1, targets_C[:, None], hot_C1)
    if spec.smoothing:
        dlogits_CV.sub_(spec.smoothing / dlogits_CV.shape[1])
    if chunk.softcap_slope_CV is not None:
        dlogits_CV.mul_(chunk.softcap_slope_CV)
    return dlogits_CV.mul_(scale_C[:, None])
