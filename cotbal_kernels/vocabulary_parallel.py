"""A head whose vocabulary is split over the ranks of a process group (tensor parallelism of the head).

Rank r holds the rows ``bounds[r] : bounds[r + 1]`` of the head; hidden states, labels and task ids are the same on
all ranks. Every rank runs the row ops on its shard, then one all_gather of four numbers per row and rank makes the
loss of the whole vocabulary, and one all-reduce in the backward pass the gradient of the hidden states.

With m_r the largest logit of shard r, m the largest of all, l_r the sum of exp(z - m_r), and b_r = m - m_r >= 0:

    log l = log sum_r exp(log l_r - b_r)
    loss  = log l + sum_r (loss_r - log l_r + ((1 - smoothing) [target in r] + even V_r) b_r) + z_loss (m + log l)^2

where loss_r is what the row op returns for the shard without the z-loss. All differences are taken from m, so that
an offset common to the logits costs no digits; the sums are in float64, in the order of the ranks, so that every
rank has the same bits.

Cost per rank, F the flop of one product with the whole head: F / R forward and 3 F / R backward. Sent: 16 bytes per
position forward, 4 D bytes per computed row backward (twice that in float64). Every rank has to call, with and without
gradients; the first call with a head of some size gathers the sizes of the shards and waits for the device (see
:func:`cotbal_kernels.sharded_head.find_shard`), so it cannot be part of a CUDA graph.
"""

# Shapes: M positions, N rows that are summed, D hidden width, V rows of the head here (V_r of rank r), R ranks.

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops
from .interface import Targets, TokenLoss, compute_dtype
from .refusals import refuse_batched_backward, refuse_double_backward
from .rows import on_cpu
from .sharded_head import Shard, gather
from .validation import checks_requested


@torch.compiler.disable
def sharded_rows(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: Targets,
    grad_weight_out: Tensor | None,
    shard: Shard,
    spec: TokenLoss,
    chunk_size: int,
    backend: str,
    check: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], Targets]:
    """What ``ops.linear_task_ce_rows`` returns for the whole vocabulary, the same bits on all ranks.

    ``targets`` are those of the whole vocabulary; they come back with NaN for poison where the ranks do not have the
    same labels (on a CPU, or when checks are requested, that raises on all ranks).
    """
    arguments = (targets.targets_M, targets.rows_N, targets.num_rows, grad_weight_out, shard, spec, chunk_size, backend)
    loss_M, hit_M, stats_2M, agree = _ShardedRows.apply(hidden_MD, weight_VD, bias_V, *arguments)
    if (on_cpu(hidden_MD) or checks_requested(check)) and not bool(agree):
        raise ValueError(
            "labels must be the same on all ranks of process_group (and so must hidden, task_ids and task_weights): "
            "its ranks share the vocabulary, not the batch. A weight that FSDP has sharded is to be gathered first"
        )
    poison = targets.poison + torch.where(agree, 0.0, torch.nan)
    return (loss_M, hit_M, stats_2M), targets._replace(poison=poison)


class _ShardedRows(torch.autograd.Function):
    """Forward F / R and one all_gather; backward 3 F / R and one all-reduce, if the hidden states need a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        rows_N: Tensor,
        num_rows: Tensor,
        grad_weight_out: Tensor | None,
        shard: Shard,
        spec: TokenLoss,
        chunk_size: int,
        backend: str,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        local_M = targets_M - shard.start
        local_M = torch.where((local_M >= 0) & (local_M < shard.rows), local_M, -1)
        wide = compute_dtype(hidden_MD.dtype)
        if shard.rows == 0:  # padding only
            loss_M = hidden_MD.new_zeros(targets_M.shape, dtype=wide)
            hit_M, stats_2M = torch.zeros_like(targets_M), torch.stack([loss_M - torch.inf, loss_M])
        else:
            loss_M, hit_M, stats_2M = ops.linear_task_ce_rows(
                hidden_MD,
                weight_VD[: shard.rows],
                None if bias_V is None else bias_V[: shard.rows],
                local_M,
                rows_N,
                num_rows,
                None,
                spec._replace(z_loss=0.0),
                chunk_size,
                backend,
            )
        # The fourth number is target + 1, negative without a hit: so every rank sees whether the labels agree.
        mark_M = torch.where(hit_M > 0, targets_M + 1, -1 - targets_M).to(wide)
        parts_4M = torch.stack([stats_2M[0], stats_2M[1], loss_M - stats_2M[1], mark_M])
        parts_R4M = gather(parts_4M, shard.group)
        loss_M, hit_M, stats_2M, agree = _combine(parts_R4M, targets_M, shard, spec)
        ctx.mark_non_differentiable(hit_M, stats_2M, agree)
        ctx.save_for_backward(hidden_MD, weight_VD, bias_V, local_M, rows_N, num_rows, stats_2M)
        ctx.grad_weight_out, ctx.shard, *ctx.options = grad_weight_out, shard, spec, chunk_size, backend
        return loss_M, hit_M, stats_2M, agree

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_M is None:
            return (None,) * 11
        refuse_double_backward("a vocabulary-parallel loss")
        refuse_batched_backward("a vocabulary-parallel loss", grad_M)
        gradients = _shard_gradients(ctx, grad_M, *ctx.saved_tensors)
        return *gradients, *(None,) * 8


def _shard_gradients(
    ctx: Any,
    grad_M: Tensor,
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    local_M: Tensor,
    rows_N: Tensor,
    num_rows: Tensor,
    stats_2M: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX of the whole vocabulary; dW and db of the shard, zero in its padding."""
    shard, into, need = ctx.shard, ctx.grad_weight_out, ctx.needs_input_grad[:3]
    wide, rows, padding = compute_dtype(hidden_MD.dtype), shard.rows, weight_VD.shape[0] - shard.rows
    grad_weight_VD = None
    if need[1] and into is None and padding:
        grad_weight_VD = into = torch.zeros_like(weight_VD)
    if rows:
        grad_hidden_MD, grad_rows_VD, grad_bias_V = ops.linear_task_ce_rows_backward(
            grad_M,
            hidden_MD,
            weight_VD[:rows],
            None if bias_V is None else bias_V[:rows],
            local_M,
            rows_N,
            num_rows,
            stats_2M,
            None if into is None else into[:rows],
            need,
            *ctx.options,
            wide,
        )
    else:
        grad_hidden_MD, grad_rows_VD = torch.zeros_like(hidden_MD, dtype=wide), weight_VD[:0]
        grad_bias_V = weight_VD.new_zeros(0)
    if need[1] and into is None:
        grad_weight_VD = grad_rows_VD
    return (
        _sum_over_ranks(grad_hidden_MD, rows_N, num_rows, shard.group, hidden_MD.dtype) if need[0] else None,
        grad_weight_VD,
        torch.nn.functional.pad(grad_bias_V, (0, padding)) if need[2] else None,
    )


def _combine(
    parts_R4M: Tensor, targets_M: Tensor, shard: Shard, spec: TokenLoss
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, hit and statistics of the whole vocabulary, 0 where a position is not computed (see the top).

    And whether all ranks have the same targets.
    """
    starts_R1, stops_R1 = shard.bounds_on_device[:-1, None], shard.bounds_on_device[1:, None]
    max_RM, log_sum_RM, rest_RM, mark_RM = parts_R4M.double().unbind(1)
    max_M, owner_M = max_RM.max(0)  # the first rank among equals
    nothing_RM = max_RM == -torch.inf  # padding only, or a shard whose bias is -inf everywhere
    below_RM = max_M - max_RM
    log_sum_M = torch.logsumexp(log_sum_RM.masked_fill(nothing_RM, 0) - below_RM, 0)
    inside_RM = (targets_M >= starts_R1) & (targets_M < stops_R1)
    share_RM = inside_RM.double() * (1 - spec.smoothing) + (stops_R1 - starts_R1).double() * spec.even
    moved_RM = torch.where(share_RM > 0, share_RM * below_RM, 0)
    loss_M = log_sum_M + (rest_RM.masked_fill(nothing_RM, 0) + moved_RM).sum(0)
    if spec.z_loss:
        loss_M = loss_M + spec.z_loss * (max_M + log_sum_M) ** 2
    hit_M = mark_RM.gather(0, owner_M[None])[0] > 0
    computed_M = targets_M >= 0
    stats_2M = torch.stack([max_M, log_sum_M])
    wide = parts_R4M.dtype
    return (
        torch.where(computed_M, loss_M, 0).to(wide),
        (hit_M & computed_M).to(torch.int64),
        torch.where(computed_M, stats_2M, 0).to(wide),
        (mark_RM.abs() == mark_RM[:1].abs()).all(),
    )


def _sum_over_ranks(
    grad_MD: Tensor, rows_N: Tensor, num_rows: Tensor, group: dist.ProcessGroup, dtype: torch.dtype
) -> Tensor:
    """The sum of the computed rows over the ranks, in the dtype of ``grad_MD``, then rounded; the others are zero."""
    positions = grad_MD.shape[0]
    if on_cpu(rows_N):
        rows_N = rows_N[: int(num_rows)]
    packed_ND = grad_MD
    if rows_N.shape[0] < positions:  # only they travel
        packed_ND = grad_MD.index_select(0, rows_N.clamp(max=positions - 1))
    if packed_ND.numel():
        dist.all_reduce(packed_ND, group=group)
    if packed_ND is grad_MD:
        return grad_MD.to(dtype)
    # The last row is for the entries of rows_N that are no position.
    out_MD = grad_MD.new_zeros((positions + 1, grad_MD.shape[1]), dtype=dtype)
    return out_MD.index_copy_(0, rows_N, packed_ND.to(dtype))[:positions]
