"""The global denominator of Eq. 2: over every rank that holds other tokens and every micro-batch of a step.

With a normalizer per micro-batch the loss is another one: where a micro-batch holds one task only, its weight
cancels exactly. So count first, over the whole accumulation window, then pass the result to every call.

Ranks that hold other tokens are those of data parallelism and those among which the positions of a sequence are split
(sequence, context parallelism); not those that share the vocabulary of the head. With contiguous parts of sequences
:func:`shift_targets_across_ranks` makes the labels; with any other split (zig-zag) shift the labels of the whole
sequence and split them as the positions. Either way the calls then take ``shift=False``.
"""

# Shapes: M flattened positions, K tasks, R ranks, ... leading shape of the batch, S positions here.

import sys
from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import task_ops, validation
from .backends import resolve_backend
from .interface import Targets
from .per_task import task_normalizer
from .targets import flatten_targets, shift_targets

_ANY_LABEL = sys.maxsize


def global_task_tokens(
    labels: Tensor | Iterable[Tensor],
    task_ids: Tensor | Iterable[Tensor],
    num_tasks: int,
    *,
    ignore_index: int = -100,
    shift: bool = False,
    group: dist.ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """Supervised tokens of each task over all ranks and micro-batches: T_k of Eq. 2.

    Args:
        labels: ``[...]`` integers, or a list of them, one per micro-batch; shapes may differ. Not empty.
        task_ids: as ``labels``: each ``[...]`` or ``[first dimension]``; integers in [0, num_tasks).
        num_tasks: K.
        ignore_index, shift: as in :func:`linear_task_cross_entropy`; pass the same values.
        group: process group, or a device mesh, whose dimensions are summed over one after the other; None is
            the default group. All its ranks hold different tokens and must call (one all-reduce of K numbers).

    Returns:
        int64 ``[K]``. Without ``torch.distributed`` initialised, the count of this process.
    """
    all_labels, all_task_ids = _micro_batches("labels", labels), _micro_batches("task_ids", task_ids)
    if not all_labels or len(all_labels) != len(all_task_ids):
        raise ValueError(
            "labels and task_ids must be two tensors, or two lists of as many (at least one), "
            f"got {len(all_labels)} and {len(all_task_ids)}"
        )
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")
    validation.check_flags(shift=shift)
    for some_labels, some_ids in zip(all_labels, all_task_ids, strict=True):
        validation.check_labels_and_tasks(some_labels, some_ids)
    flat = [
        flatten_targets(some_labels, some_ids, ignore_index, shift)
        for some_labels, some_ids in zip(all_labels, all_task_ids, strict=True)
    ]
    groups = _groups(group)
    device = all_labels[0].device
    labels_M = torch.cat([some_labels.to(device) for some_labels, _ in flat])
    task_ids_M = torch.cat([some_ids.to(device) for _, some_ids in flat])
    ones_K = torch.ones(num_tasks, dtype=torch.float32, device=device)
    arguments = (labels_M, task_ids_M, ones_K, _ANY_LABEL, ignore_index, False, False, len(labels_M))
    tokens_K = Targets(*task_ops.prepare_targets(*arguments, resolve_backend("auto", device))).tokens_K
    for one in groups:
        dist.all_reduce(tokens_K, group=one)
    return tokens_K


def _groups(given: dist.ProcessGroup | DeviceMesh | None) -> Sequence[dist.ProcessGroup | None]:
    """The groups over which to sum one after the other; none without ``torch.distributed`` initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    if isinstance(given, DeviceMesh) and given.get_coordinate() is not None:
        return given.get_all_groups()
    validation.require_member("group", given)
    return [cast("dist.ProcessGroup | None", given)]


def global_normalizer(
    labels: Tensor | Iterable[Tensor],
    task_ids: Tensor | Iterable[Tensor],
    task_weights: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = False,
    aggregation: str = "token",
    group: dist.ProcessGroup | DeviceMesh | None = None,
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
    labels, task_ids = _micro_batches("labels", labels), _micro_batches("task_ids", task_ids)
    validation.check_task_weights(task_weights, "labels", labels[0] if labels else task_weights)
    tokens_K = global_task_tokens(
        labels, task_ids, task_weights.shape[0], ignore_index=ignore_index, shift=shift, group=group
    )
    return task_normalizer(task_weights, tokens_K, aggregation)


def _micro_batches(name: str, given: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    if not isinstance(given, Iterable):
        raise ValueError(f"{name} must be a tensor or a list of tensors, got {type(given).__name__}")
    batches = list(given)
    for batch in batches:
        validation.require_tensor(f"each of {name}", batch)
    return batches


def shift_targets_across_ranks(
    labels: Tensor, task_ids: Tensor, ignore_index: int = -100, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Labels and task ids of the next position where the ranks hold consecutive parts of the same sequences.

    The last position here gets the first label and task id of the next rank, that of the last rank ``ignore_index``:
    what ``shift=True`` does to the whole sequence. Pass the result with ``shift=False``.

    Args:
        labels: ``[..., S]`` integers: part r of the positions on rank r of the group. S may differ from rank to rank,
            0 included; the leading shape is the same.
        task_ids: ``[..., S]``, or ``[first dimension]`` for one task per sequence.
        ignore_index: label of unsupervised positions.
        group: process group; None is the default one. Every rank of it must call (one all_gather of two numbers per
            sequence). Without ``torch.distributed`` initialised this rank is the only one.

    Returns:
        int64 labels and task ids, ``[..., S]`` both.
    """
    validation.check_labels_and_tasks(labels, task_ids)
    connected = dist.is_available() and dist.is_initialized()
    if connected:
        validation.require_member("group", group)
    flat_labels, flat_ids = flatten_targets(labels, task_ids, ignore_index, shift=False)
    parts = torch.stack([flat_labels, flat_ids]).reshape(2, *labels.shape)  # [2, ..., S]
    shifted_labels, shifted_ids = shift_targets(parts[0], parts[1], ignore_index)
    if not connected:
        return shifted_labels, shifted_ids
    first = torch.full((3, *labels.shape[:-1]), ignore_index, dtype=torch.int64, device=labels.device)
    first[2:] = 0  # whether there is a position at all; a number is filled into a slice, but copied to an element
    if labels.shape[-1]:
        first[:2], first[2:] = parts[..., 0], 1
    firsts = [torch.empty_like(first) for _ in range(dist.get_world_size(group))]
    dist.all_gather(firsts, first, group=group)
    if labels.shape[-1]:
        following = torch.full_like(first, ignore_index)
        for later in reversed(firsts[dist.get_rank(group) + 1 :]):
            following = torch.where(later[2] > 0, later, following)
        # Behind the last sequence the label is ignored, and so is the task id.
        shifted_labels[..., -1] = following[0]
        shifted_ids[..., -1] = torch.where(following[0] == ignore_index, shifted_ids[..., -1], following[1])
    return shifted_labels, shifted_ids
