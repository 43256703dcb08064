"""The Triton backend: no logits in memory, no host synchronisation, every gradient rounded once.

Gradients in forward (scalar losses). One pass over the vocabulary gives the statistics of every row and leaves
``exp(z - tile maximum)``; a second pass turns them into the gradient of the logits and takes dX and dW, one
vocabulary slice at a time, each slice of dW one product over all rows. 3F.

Where the exponentials wait: in the workspace if all of them fit it. If not, in the memory of dW itself, those of
bfloat16 in 12 bits each. The second pass takes the last slice first, and what waits of the slices before it lies in
front of the memory that its dW is written to. So up to 4/3 D rows (D in float32; 2D in float16, whose dW waits in
float32) cost 3F whatever the vocabulary, and no buffer as large as V x D or N x V exists beside dW. Of the rows beyond,
the workspace holds as many as it has room for; the logits of the others are computed again slice by slice: up to 4F.

Recomputation (losses per row, differentiable task losses, ``recompute``): only the two statistics of every row
are kept; the second pass computes all logits again. 4F, or 3F with a frozen head.

Shapes are those of the capacity, row counts are read by the kernels: the launches are the same for any labels,
which is what CUDA graphs need.
"""

# Shapes: M positions, N packed rows (the capacity), D hidden width, V vocabulary, T vocabulary tiles, K tasks.

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import portable
from .interface import (
    LinearOutput,
    LinearProblem,
    Need,
    Targets,
    TokenLoss,
    compute_capability,
    saved_grad_dtypes,
)
from .triton_kernels.compact import compact_kernel
from .triton_kernels.configs import COMPILED, blocks_for, programs_for
from .triton_kernels.head import Head, KeptRows, RowResults, num_blocks, on_device
from .triton_kernels.logits import logits_gradient, logits_loss
from .triton_kernels.row_losses import task_sums_kernel
from .triton_kernels.row_scales import Scale, task_scales_kernel
from .triton_kernels.scale import scale_kernel
from .triton_kernels.slices import Slices
from .validation import check_capacity, check_target_values, checks_requested


def unavailable_reason(device: torch.device | None) -> str | None:
    """Why this backend cannot run on a device (None: on none of this machine), or None."""
    if not torch.cuda.is_available():
        return "it needs a CUDA device (use backend='portable' on a CPU)"
    if torch.version.hip is not None:  # there a "CUDA device" is one of AMD, whose capability is another number
        return "its kernels are for NVIDIA GPUs and this torch was built for ROCm (use backend='portable')"
    capability = compute_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    return None


class _Gradients(NamedTuple):
    """Outputs of the backward pass; None where one is not wanted."""

    hidden_MD: Tensor | None  # float32
    weight_VD: Tensor | None
    bias_V: Tensor | None  # float32

    def add(
        self,
        head: Head,
        start: int,
        slices: Slices,
        buffer: Tensor,
        kept: list[KeptRows],
        stats_2M: Tensor,
        scale: Scale,
        accumulate: bool = False,
    ) -> None:
        """Second pass over the rows from ``start``, as many as ``buffer`` has, slice by slice, the last slice first.

        ``kept`` are the first of them; the logits of the others are computed again.
        """
        window = (start, buffer.shape[0])
        known = sum(part.window[1] for part in kept)
        again = (start + known, window[1] - known)
        for index, bounds in reversed(list(enumerate(slices.ranges()))):
            for part in kept:
                head.dlogits(part, index, bounds, buffer[part.window[0] - start :], stats_2M, scale)
            if again[1]:
                head.recompute(again, bounds, buffer[known:], stats_2M, scale)
            if self.hidden_MD is not None:
                head.grad_hidden(window, bounds, buffer, scale, self.hidden_MD)
            if self.bias_V is not None:
                head.grad_bias(window, bounds, buffer, scale, self.bias_V)
            if self.weight_VD is not None:  # last: it overwrites exponentials of this slice
                head.grad_weight(bounds, buffer, scale, self.weight_VD, accumulate)


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
    """One launch."""
    raises = checks_requested(check)
    if raises:
        check_target_values(labels_M, task_ids_M, task_weights_K, labels_M != ignore_index, vocab_size)
    size, num_tasks = labels_M.shape[0], task_weights_K.shape[0]
    out = Targets.empty(labels_M, task_weights_K, capacity)
    out.tokens_K.zero_()
    with on_device(labels_M):
        compact_kernel[(1,)](
            labels_M.contiguous(),
            task_ids_M.contiguous(),
            task_weights_K.contiguous(),
            *out,
            size,
            num_tasks,
            vocab_size,
            ignore_index,
            capacity,
            SKIP_ZERO=skip_zero,
            BLOCK=blocks_for(labels_M.device).compact,
            BLOCK_K=256,
            num_warps=16,
            **COMPILED,
        )
    if raises:
        check_capacity(out.num_rows, capacity)
    return out


def task_scales(
    task_weights_K: Tensor, tokens_K: Tensor, poison: Tensor, normalizer: Tensor | None, per_task: bool
) -> tuple[Tensor, Tensor]:
    """One launch."""
    scale_K, denominator_K = (task_weights_K.new_empty(task_weights_K.shape) for _ in range(2))
    with on_device(task_weights_K):
        task_scales_kernel[(1,)](
            task_weights_K.contiguous(),
            tokens_K,
            poison,
            normalizer if normalizer is None else normalizer.contiguous(),
            scale_K,
            denominator_K,
            task_weights_K.shape[0],
            PER_TASK=per_task,
            BLOCK=256,
            **COMPILED,
        )
    return scale_K, denominator_K


def task_sums(loss_M: Tensor, hit_M: Tensor, tasks_M: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
    """One launch, one program per task."""
    if loss_M.dtype == torch.float64:
        return portable.task_sums(loss_M, hit_M, tasks_M, num_tasks)
    loss_K, correct_K = loss_M.new_empty(num_tasks), hit_M.new_empty(num_tasks)
    with on_device(loss_M):
        task_sums_kernel[(num_tasks,)](
            loss_M,
            hit_M,
            tasks_M,
            loss_K,
            correct_K,
            loss_M.shape[0],
            BLOCK=blocks_for(loss_M.device).task_sums,
            **COMPILED,
        )
    return loss_K, correct_K


def linear_forward(
    problem: LinearProblem,
    tasks_M: Tensor,
    scale_K: Tensor,
    need: Need,
    spec: TokenLoss,
    chunk_size: int,
) -> LinearOutput:
    """Gradients in forward: 1F to 4F, see the module."""
    hidden_MD, weight_VD, _, targets_M, *_ = problem
    if hidden_MD.dtype == torch.float64:  # gradient checks: no tile is made for it
        return portable.linear_forward(problem, tasks_M, scale_K, need, spec, chunk_size)
    head = Head(problem, spec, chunk_size)
    dtypes = saved_grad_dtypes(hidden_MD.dtype)
    rows = RowResults.zeros(targets_M)
    gradients = _Gradients(None, None, None)
    with on_device(hidden_MD):
        if not any(need):
            head.forward((0, head.capacity), rows)
        else:
            scale = Scale.of(scale_K, tasks_M, problem.rows_N, problem.num_rows, targets_M.shape[0], spec.scale)
            if need[1]:
                grad_VD = hidden_MD.new_empty(weight_VD.shape, dtype=dtypes[1])
                gradients = _slices_of_vocabulary(head, need, grad_VD, rows, scale)
            else:
                gradients = _windows_of_rows(head, need, rows, scale)
        task_loss_K, task_correct_K = task_sums(rows.loss_M, rows.hit_M, tasks_M, scale_K.shape[0])
    empty = [hidden_MD.new_empty(0, dtype=dtype) for dtype in dtypes]
    returned = (full if full is not None else none for full, none in zip(gradients, empty, strict=True))
    loss = (scale_K * task_loss_K).sum()
    return LinearOutput(loss, task_loss_K, task_correct_K, rows.stats_2M.sum(0), *returned)


def _windows_of_rows(head: Head, need: Need, rows: RowResults, scale: Scale) -> _Gradients:
    """Frozen head: as many rows at a time as the workspace holds, with the whole vocabulary: 2F."""
    dtype = head.packed_ND.dtype
    gradients = _new_gradients(head, need, dtype)
    count = head.window_rows(head.wide_bytes(need[0], dtype))
    buffer = head.workspace(count, head.padded)
    for start in range(0, head.capacity, count):
        here = min(count, head.capacity - start)
        window, part = (start, here), buffer[:here]
        slices = Slices((0, head.vocab_size), head.padded, 0, here, in_place=True)
        if head.keeps_exponentials:
            kept = [head.exponentials(window, part, False, rows)]
        else:
            head.forward(window, rows)
            kept = []
        gradients.add(head, start, slices, part, kept, rows.stats_2M, scale)
        del kept  # before the next window has its own
    return gradients


def _slices_of_vocabulary(head: Head, need: Need, grad_VD: Tensor, rows: RowResults, scale: Scale) -> _Gradients:
    """Exponentials of as many rows as have a place are kept; dW takes a vocabulary slice over all rows at once.

    What is only needed in the second pass is allocated behind the first, whose statistics are gone by then.
    """
    dtype = head.packed_ND.dtype
    storage = grad_VD.view(-1).view(dtype)
    first_pass = head.capacity * (head.statistics_bytes - head.kept_bytes)
    second_pass = head.wide_bytes(need[0], dtype)
    slices = head.slices(max(first_pass, second_pass), storage.numel() if head.keeps_exponentials else None)
    stored, held = slices.stored_rows, slices.held_rows
    if stored + held < head.capacity:
        head.forward((stored + held, head.capacity - stored - held), rows)
    buffer = head.workspace(head.capacity, slices.stride)
    packed, quarters = head.quarters < 4 and not slices.in_place, head.quarters
    kept = []
    if stored:
        shape = (len(slices.ranges()), stored, slices.stride * quarters // 4)
        kept.append(head.exponentials((0, stored), storage[: math.prod(shape)].view(shape), packed, rows))
    if held:
        place = buffer if slices.in_place else head.workspace(held, head.padded * quarters // 4)
        kept.append(head.exponentials((stored, held), place, packed, rows))
    gradients = _new_gradients(head, need, dtype, grad_VD)
    gradients.add(head, 0, slices, buffer, kept, rows.stats_2M, scale)
    return gradients


def linear_rows_forward(
    problem: LinearProblem,
    spec: TokenLoss,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """1F."""
    if problem.hidden_MD.dtype == torch.float64:
        return portable.linear_rows_forward(problem, spec, chunk_size)
    head = Head(problem, spec, chunk_size)
    rows = RowResults.zeros_apart(problem.targets_M)
    with on_device(problem.hidden_MD):
        head.forward((0, head.capacity), rows)
    return rows.loss_M, rows.hit_M, rows.stats_2M


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
    hidden_MD = problem.hidden_MD
    dtype = hidden_MD.dtype
    if dtype == torch.float64:
        return portable.linear_rows_backward(
            problem, grad_M, stats_2M, grad_weight_out, need, spec, chunk_size, grad_hidden_dtype
        )
    head = Head(problem, spec, chunk_size)
    gradients = _new_gradients(head, need, dtype, grad_weight_out)
    slices = head.slices(head.wide_bytes(need[0], grad_hidden_dtype), None)
    buffer = head.workspace(head.capacity, slices.stride)
    accumulate = grad_weight_out is not None
    with on_device(hidden_MD):
        scale = Scale.of(grad_M, None, problem.rows_N, problem.num_rows, grad_M.shape[0], spec.scale)
        gradients.add(head, 0, slices, buffer, [], stats_2M, scale, accumulate)
    del buffer, head  # before dX has a copy in its final dtype
    grad_VD = None if accumulate else gradients.weight_VD
    exact = ((gradients.hidden_MD, grad_hidden_dtype), (grad_VD, dtype), (gradients.bias_V, dtype))
    grad_hidden, grad_weight, grad_bias = (
        hidden_MD.new_empty(0, dtype=final) if grad is None else grad.to(final) for grad, final in exact
    )
    return grad_hidden, grad_weight, grad_bias


def logits_rows_forward(
    logits_MV: Tensor, targets_M: Tensor, spec: TokenLoss, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Every logit read once."""
    if logits_MV.dtype == torch.float64:
        return portable.logits_rows_forward(logits_MV, targets_M, spec, chunk_size)
    rows = RowResults.zeros_apart(targets_M)
    logits_loss(logits_MV, targets_M, rows, spec)
    return rows.loss_M, rows.hit_M, rows.stats_2M


def logits_rows_backward(
    grad_M: Tensor,
    logits_MV: Tensor,
    targets_M: Tensor,
    stats_2M: Tensor,
    spec: TokenLoss,
    chunk_size: int,
    out_MV: Tensor,
) -> None:
    """Every logit read once more and its gradient written."""
    if logits_MV.dtype == torch.float64:
        portable.logits_rows_backward(grad_M, logits_MV, targets_M, stats_2M, spec, chunk_size, out_MV)
    else:
        logits_gradient(grad_M, logits_MV, targets_M, stats_2M, spec, out_MV)


def scale_gradient(grad: Tensor, factor: Tensor, out: Tensor) -> None:
    """One pass, none in place where the factor is 1."""
    if grad.dtype == torch.float64:
        portable.scale_gradient(grad, factor, out)
    elif grad.numel():
        block = blocks_for(grad.device).scale
        programs = min(num_blocks(grad.numel(), block), 8 * programs_for(grad.device))
        with on_device(grad):
            scale_kernel[(programs,)](
                grad,
                factor.to(torch.float32),
                out,
                grad.numel(),
                IN_PLACE=out is grad,
                BLOCK=block,
                num_warps=8,
                **COMPILED,
            )


def _new_gradients(head: Head, need: Need, weight_dtype: torch.dtype, into: Tensor | None = None) -> _Gradients:
    weight_VD, wide = head.weight_VD, torch.float32
    shape = (head.targets_M.shape[0], head.width)
    return _Gradients(
        weight_VD.new_zeros(shape, dtype=wide) if need[0] else None,
        (weight_VD.new_empty(weight_VD.shape, dtype=weight_dtype) if into is None else into) if need[1] else None,
        weight_VD.new_zeros(weight_VD.shape[0], dtype=wide) if need[2] else None,
    )
