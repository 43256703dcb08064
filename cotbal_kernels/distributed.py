"""The global denominator of Eq. 2: over every data-parallel rank and every micro-batch of an optimizer step.

With a normalizer per micro-batch the loss is another one: where a micro-batch holds one task only, its weight
cancels exactly. So count first, over the whole accumulation window, then pass the result to every call.
"""

# Shapes: M flattened positions, K tasks.

import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops, validation
from .backends import resolve_backend
from .functional import flatten_targets, task_normalizer
from .interface import Targets

_ANY_LABEL = sys.maxsize


def global_task_tokens(
    labels: Tensor | Sequence[Tensor],
    task_ids: Tensor | Sequence[Tensor],
    num_tasks: int,
    *,
    ignore_index: int = -100,
    shift: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Supervised tokens of each task over all ranks and micro-batches: T_k of Eq. 2.

    Args:
        labels: ``[...]`` integers, or a list of them, one per micro-batch; shapes may differ. Not empty.
        task_ids: as ``labels``: each ``[...]`` or ``[first dimension]``; integers in [0, num_tasks).
        num_tasks: K.
        ignore_index, shift: as in :func:`linear_task_cross_entropy`; pass the same values.
        group: process group; None is the default one. Every rank of it must call (one all-reduce of K
        numbers).

    Returns:
        int64 ``[K]``. Without ``torch.distributed`` initialised, the count of this process.
    """
    all_labels = [labels] if isinstance(labels, Tensor) else list(labels)
    all_task_ids = [task_ids] if isinstance(task_ids, Tensor) else list(task_ids)
    if not all_labels or len(all_labels) != len(all_task_ids):
        raise ValueError(
            "labels and task_ids must be two tensors, or two lists of as many (at least one), "
            f"got {len(all_labels)} and {len(all_task_ids)}"
        )
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")
    for some_labels, some_ids in zip(all_labels, all_task_ids, strict=True):
        validation.check_labels_and_tasks(some_labels, some_ids)
    flat = [
        flatten_targets(some_labels, some_ids, ignore_index, shift)
        for some_labels, some_ids in zip(all_labels, all_task_ids, strict=True)
    ]
    device = all_labels[0].device
    labels_M = torch.cat([some_labels.to(device) for some_labels, _ in flat])
    task_ids_M = torch.cat([some_ids.to(device) for _, some_ids in flat])
    ones_K = torch.ones(num_tasks, dtype=torch.float32, device=device)
    arguments = (labels_M, task_ids_M, ones_K, _ANY_LABEL, ignore_index, False, False, len(labels_M))
    tokens_K = Targets(*ops.prepare_targets(*arguments, resolve_backend("auto", device.type))).tokens_K
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tokens_K, group=group)
    return tokens_K


def global_normalizer(
    labels: Tensor | Sequence[Tensor],
    task_ids: Tensor | Sequence[Tensor],
    task_weights: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = False,
    aggregation: str = "token",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """What to pass as ``normalizer`` to every call of one optimizer step, on every rank.

    Gradients must then be *summed* over ranks and micro-batches: where the framework averages over ranks
    (DDP, DeepSpeed), multiply the loss by the number of ranks.

    Args:
        labels, task_ids, ignore_index, shift, group: as in :func:`global_task_tokens`.
        task_weights: ``[K]`` float32.
        aggregation: "token" or "none": sum_k lambda_k T_k, a scalar (Eq. 2). "task": ``[K]``,
            T_k * sum of lambda over the tasks present anywhere. "sum" has no normalizer and is refused.

    Returns:
        float32, on the device of ``task_weights``, differentiable in ``task_weights``. 0 when no token is
        supervised anywhere, which the loss functions take to mean a loss of 0.
    """
    validation.check_aggregation(aggregation, ("token", "task", "none"))
    first = labels if isinstance(labels, Tensor) else next(iter(labels), None)
    validation.check_task_weights(task_weights, "labels", task_weights if first is None else first)
    tokens_K = global_task_tokens(
        labels, task_ids, task_weights.shape[0], ignore_index=ignore_index, shift=shift, group=group
    )
    return task_normalizer(task_weights, tokens_K, aggregation)
