"""Norms of the per-task gradients of the head's weight, without a gradient of that size.

The gradient of S_i = sum of the cross-entropies of task i is sum_t dz_t (x) x_t over its tokens, with
dz_t = softmax(z_t) - onehot(label_t). Its squared norm is (dZ dZ^T * X X^T).sum() over that task: two Gram matrices
``[M_i, M_i]``. dZ is made one block of the vocabulary at a time, and Gram matrices add up over blocks.

A norm is taken of the *sum* over ranks and micro-batches, which no combination of their norms gives. So the rows of
all ranks are gathered (M x D numbers; the gradients would be K x V x D), each rank takes a share of the vocabulary,
and K numbers are added up.

Cost in products of 2*M*V*D flop, M being all supervised tokens of the step: 1 for the logits, shared among the ranks,
plus sum_i M_i^2 (V + D) / (M V D), small while tasks have fewer tokens than D. A task with more tokens than D is
summed as dZ^T X ``[block, D]`` instead, which costs M_i / M. The count of each task is read on the host.
"""

# Shapes: M supervised rows, D hidden width, V vocabulary, B rows of a vocabulary block, K tasks.

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .targets import flatten_targets
from .validation import require_member

_BLOCK_BYTES = 1 << 27  # of one block of float32 logits


class HeadRows(NamedTuple):
    """What reached the head at the supervised positions of one micro-batch."""

    hidden: Tensor  # [M, D]
    lse: Tensor  # [M] float32, log-sum-exp of the logits
    labels: Tensor  # [M] int64
    task_ids: Tensor  # [M] int64


def supervised_rows(
    hidden: Tensor,
    lse: Tensor,
    labels: Tensor,
    task_ids: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = False,
) -> HeadRows:
    """Keep the supervised positions, detached. Waits for the device: the number of rows depends on the labels.

    Args:
        hidden: ``[..., D]``.
        lse: ``[...]`` float32, as :class:`TaskLoss` returns it.
        labels, task_ids, ignore_index, shift: as in :func:`linear_task_cross_entropy`.
    """
    labels_M, tasks_M = flatten_targets(labels, task_ids, ignore_index, shift)
    kept_M = (labels_M != ignore_index).nonzero().squeeze(1)  # once: the host waits for the number of rows
    rows_MD = hidden.detach().reshape(-1, hidden.shape[-1])[kept_M]
    return HeadRows(rows_MD, lse.detach().reshape(-1)[kept_M], labels_M[kept_M], tasks_M[kept_M])


@torch.no_grad()
def head_gradient_norms(
    rows: Sequence[HeadRows],
    weight: Tensor,
    num_tasks: int,
    *,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Norm of d S_k / d weight for every task, S_k summed over all rows of all ranks.

    Args:
        rows: of each micro-batch; at least one, empty ones allowed.
        weight: ``[V, D]``, whole on every rank (gather it first under ZeRO-3).
        num_tasks: K.
        bias: ``[V]`` or None.
        logit_softcap: as in :func:`linear_task_cross_entropy`.
        group: process group; every rank of it must call.

    Returns:
        float64 ``[K]``, the same on every rank; 0 for a task without tokens. Divided by T_k it is the norm for the
        task's mean loss.
    """
    all_rows = HeadRows(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
    rank, world = 0, 1
    if dist.is_available() and dist.is_initialized():
        require_member("group", group)
        rank, world = dist.get_rank(group), dist.get_world_size(group)
    if world > 1:
        all_rows = _gather(all_rows, world, group)
    order_M = torch.argsort(all_rows.task_ids, stable=True)
    hidden_MD, lse_M, labels_M, tasks_M = (part[order_M] for part in all_rows)
    hidden_MD = hidden_MD.to(weight.dtype)
    counts = (tasks_M[:, None] == torch.arange(num_tasks, device=tasks_M.device)).sum(0).tolist()
    ends = torch.tensor(counts).cumsum(0).tolist()
    tasks = [(k, slice(end - count, end)) for k, (count, end) in enumerate(zip(counts, ends, strict=True)) if count]

    vocab, width = weight.shape
    total_K = torch.zeros(num_tasks, dtype=torch.float64, device=weight.device)
    grams = {k: hidden_MD.new_zeros(counts[k], counts[k], dtype=torch.float32) for k, _ in tasks if counts[k] <= width}
    first, last = vocab * rank // world, vocab * (rank + 1) // world
    size = max(1, _BLOCK_BYTES // (4 * max(1, len(lse_M))))
    for start in range(first, last, size) if tasks else ():
        block = slice(start, min(start + size, last))
        dz_MB = _logit_gradients(hidden_MD, lse_M, labels_M, weight, bias, logit_softcap, block)
        for k, own in tasks:
            if k in grams:
                grams[k] += dz_MB[own] @ dz_MB[own].T
            else:
                total_K[k] += (dz_MB[own].T @ hidden_MD[own].float()).double().square().sum()
    for k, own in tasks:
        if k in grams:
            hidden = hidden_MD[own].float()
            total_K[k] += (grams[k] * (hidden @ hidden.T)).sum(dtype=torch.float64)
    if world > 1:
        dist.all_reduce(total_K, group=group)
    return total_K.clamp(min=0).sqrt()


def _logit_gradients(
    hidden_MD: Tensor,
    lse_M: Tensor,
    labels_M: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    block: slice,
) -> Tensor:
    """Columns `block` of dZ as ``[M, B]`` float32; the target's ``p - 1`` is formed before any rounding."""
    z_MB = _product(hidden_MD, weight[block].T)
    if bias is not None:
        z_MB = z_MB + bias[block].float()
    if softcap is not None:
        z_MB = softcap * torch.tanh(z_MB / softcap)
    dz_MB = torch.exp(z_MB - lse_M[:, None])
    inside_M = (labels_M >= block.start) & (labels_M < block.stop)
    column_M1 = torch.where(inside_M, labels_M - block.start, 0)[:, None]
    dz_MB.scatter_add_(1, column_M1, -inside_M[:, None].float())
    return dz_MB if softcap is None else dz_MB * (1 - (z_MB / softcap).square())


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32 from the matmul's accumulator."""
    if a.dtype == torch.float32 or a.device.type != "cuda":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _gather(rows: HeadRows, world: int, group: dist.ProcessGroup | None) -> HeadRows:
    """The rows of all ranks, in the order of ranks. They are padded to the longest rank for the exchange."""
    count = torch.tensor([len(rows.lse)], device=rows.lse.device)
    counts = [torch.zeros_like(count) for _ in range(world)]
    dist.all_gather(counts, count, group=group)
    sizes = torch.cat(counts).tolist()

    def exchange(part: Tensor) -> Tensor:
        padded = part.new_zeros(max(sizes), *part.shape[1:])
        padded[: len(part)] = part
        as_bytes = padded.reshape(-1).view(torch.uint8)  # not every backend moves every dtype
        parts = [torch.empty_like(as_bytes) for _ in range(world)]
        dist.all_gather(parts, as_bytes, group=group)
        shaped = [received.view(part.dtype).reshape(padded.shape) for received in parts]
        return torch.cat([received[:size] for received, size in zip(shaped, sizes, strict=True)])

    return rows if max(sizes) == 0 else HeadRows(*(exchange(part) for part in rows))
