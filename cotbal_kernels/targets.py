"""Labels and task ids as the ops take them: shifted, one task id per position, flattened; and the rows they are of."""

# Shapes: M flattened positions, ... leading shape of the batch.

import torch
from torch import Tensor

from . import task_ops
from .interface import Targets
from .validation import check_target_values


def shift_targets(labels: Tensor, task_ids: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Labels and task ids (same shape) of the next position; the last position becomes ``ignore_index``."""
    next_labels = labels.roll(-1, dims=-1)
    next_labels[..., -1:] = ignore_index
    return next_labels, task_ids.roll(-1, dims=-1)


def flatten_targets(labels: Tensor, task_ids: Tensor, ignore_index: int, shift: bool) -> tuple[Tensor, Tensor]:
    """Return labels and task ids as int64 ``[M]``: shifted if asked, ids per sequence repeated."""
    labels = labels.to(torch.int64)
    task_ids = task_ids.to(torch.int64)
    if task_ids.shape != labels.shape:
        task_ids = task_ids.reshape(-1, *(1,) * (labels.dim() - 1)).expand(labels.shape)
    if shift:
        labels, task_ids = shift_targets(labels, task_ids, ignore_index)
    return labels.reshape(-1), task_ids.reshape(-1)


def make_targets(
    labels: Tensor,
    task_ids: Tensor,
    task_weights: Tensor,
    vocab_size: int,
    ignore_index: int,
    shift: bool,
    differentiable_tasks: bool,
    check: bool,
    max_tokens: int | None,
    backend: str,
) -> Targets:
    """Flatten, check values where that waits for nothing, and find the rows to compute: at most ``max_tokens``."""
    labels_M, task_ids_M = flatten_targets(labels, task_ids, ignore_index, shift)
    # A task of weight 0 still has a loss, which is its derivative with respect to that weight.
    skip_zero = not (differentiable_tasks or (torch.is_grad_enabled() and task_weights.requires_grad))
    capacity = labels_M.shape[0] if max_tokens is None else min(max_tokens, labels_M.shape[0])
    return Targets(
        *task_ops.prepare_targets(
            labels_M, task_ids_M, task_weights.detach(), vocab_size, ignore_index, skip_zero, check, capacity, backend
        )
    )


def check_values(
    labels: Tensor, task_ids: Tensor, task_weights: Tensor, vocab_size: int, ignore_index: int, shift: bool
) -> None:
    """What the ops check on a CPU, for the reference: a label of -5 would be a column, task -1 would drop out."""
    labels_M, task_ids_M = flatten_targets(labels, task_ids, ignore_index, shift)
    check_target_values(labels_M, task_ids_M, task_weights.detach(), labels_M != ignore_index, vocab_size)
