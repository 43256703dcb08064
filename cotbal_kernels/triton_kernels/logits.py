"""Loss and gradient of logits that exist, a row per program.

Forward: every logit read once. Backward: read once more and the gradient written, in place if the two pointers
are the same. Both bound by memory.
"""

# Shapes: M positions, V vocabulary.

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import TokenLoss
from .configs import COMPILED, blocks_for
from .head import RowResults, num_blocks, on_device
from .project import cap_slope, softcapped


@triton.jit(do_not_specialize_on_alignment=["max_ptr", "log_sum_ptr"])
def logits_forward_kernel(
    logits_ptr,  # [M, stride]
    targets_ptr,  # [M] int64, -1 where not computed
    loss_ptr,  # [M] float32 in zeros, out
    hit_ptr,  # [M] int64 in zeros, out
    max_ptr,  # [M] float32 in zeros, out
    log_sum_ptr,  # [M] float32 in zeros, out
    vocab_size,
    stride,
    softcap,
    smoothing,
    z_loss,
    logit_scale,
    even,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + position)
    if target < 0:
        return
    row_ptr = logits_ptr + position * stride
    best_B = tl.full((BLOCK,), float("-inf"), tl.float32)
    where_B = tl.zeros((BLOCK,), tl.int32)
    sum_B = tl.zeros((BLOCK,), tl.float32)
    target_logit = tl.load(row_ptr + target).to(tl.float32)
    if HAS_SCALE:
        target_logit *= logit_scale
    if HAS_SOFTCAP:
        target_logit = softcapped(target_logit, softcap)
    shift_B = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        column_B = start + tl.arange(0, BLOCK)
        inside_B = column_B < vocab_size
        z = tl.load(row_ptr + column_B, mask=inside_B, other=float("-inf")).to(tl.float32)
        if HAS_SCALE:
            z *= logit_scale
        if HAS_SOFTCAP:
            z = tl.where(inside_B, softcapped(z, softcap), float("-inf"))
        new_B = tl.maximum(best_B, z)
        # A lane that has seen nothing yet holds -inf, and -inf - -inf is not 0.
        base_B = tl.where(new_B == float("-inf"), 0.0, new_B)
        sum_B = sum_B * tl.exp(best_B - base_B) + tl.exp(z - base_B)
        where_B = tl.where(z > best_B, column_B, where_B)
        if HAS_SMOOTHING:
            # relative to the target's logit, so that a common offset cancels before it is summed
            shift_B += tl.where(inside_B, z - target_logit, 0.0)
        best_B = new_B
    row_max = tl.max(best_B, 0)
    row_sum = tl.sum(sum_B * tl.exp(best_B - row_max), 0)
    argmax = tl.min(tl.where(best_B == row_max, where_B, vocab_size), 0)
    log_sum = tl.log(row_sum)
    loss = log_sum - (target_logit - row_max)
    if HAS_SMOOTHING:
        # even sum(z - m), with z - m from the two distances to the target's logit
        spread = even * vocab_size
        loss = log_sum - (1 - smoothing + spread) * (target_logit - row_max) - even * tl.sum(shift_B, 0)
    lse = row_max + log_sum
    loss += z_loss * lse * lse
    tl.store(loss_ptr + position, loss)
    tl.store(hit_ptr + position, (argmax == target).to(tl.int64))
    tl.store(max_ptr + position, row_max)
    tl.store(log_sum_ptr + position, log_sum)


@triton.jit(do_not_specialize_on_alignment=["max_ptr", "log_sum_ptr"])
def logits_backward_kernel(
    logits_ptr,  # [M, stride]
    out_ptr,  # [M, out_stride]
    targets_ptr,  # [M] int64
    max_ptr,  # [M] float32
    log_sum_ptr,  # [M] float32
    scale_ptr,  # [M] float32 upstream gradient
    vocab_size,
    stride,
    out_stride,
    softcap,
    smoothing,
    z_loss,
    logit_scale,
    even,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    column_B = block * BLOCK + tl.arange(0, BLOCK)
    inside_B = column_B < vocab_size
    target = tl.load(targets_ptr + position)
    out_at = out_ptr + position * out_stride + column_B
    if target < 0:
        tl.store(out_at, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=inside_B)
        return
    z = tl.load(logits_ptr + position * stride + column_B, mask=inside_B, other=float("-inf")).to(tl.float32)
    if HAS_SCALE:
        z *= logit_scale
    if HAS_SOFTCAP:
        z = softcapped(z, softcap)
    row_max = tl.load(max_ptr + position)
    log_sum = tl.load(log_sum_ptr + position)
    out = tl.exp((z - row_max) - log_sum) * (1 + 2 * z_loss * (row_max + log_sum))
    out -= tl.where(column_B == target, 1 - smoothing, 0.0) + even
    if HAS_SOFTCAP:
        out *= cap_slope(z, softcap)
    scale = tl.load(scale_ptr + position)
    if HAS_SCALE:
        scale *= logit_scale
    tl.store(out_at, (out * scale).to(out_ptr.dtype.element_ty), mask=inside_B)


def logits_loss(logits_MV: Tensor, targets_M: Tensor, rows: RowResults, spec: TokenLoss) -> None:
    """Losses, hits and statistics of the computed positions into ``rows``."""
    logits_MV = _rows_of_neighbours(logits_MV)
    if targets_M.numel():
        with on_device(logits_MV):
            logits_forward_kernel[(logits_MV.shape[0],)](
                logits_MV,
                targets_M,
                rows.loss_M,
                rows.hit_M,
                *rows.stats_2M,
                logits_MV.shape[1],
                logits_MV.stride(0),
                *spec,
                HAS_SCALE=spec.scale != 1,
                HAS_SOFTCAP=spec.softcap > 0,
                HAS_SMOOTHING=spec.smoothing > 0,
                BLOCK=_block(logits_MV),
                num_warps=8,
                **COMPILED,
            )


def logits_gradient(
    grad_M: Tensor, logits_MV: Tensor, targets_M: Tensor, stats_2M: Tensor, spec: TokenLoss, out_MV: Tensor
) -> None:
    """The gradient of every logit into ``out_MV``, which may be the logits."""
    logits_MV = _rows_of_neighbours(logits_MV)
    if targets_M.numel():
        block = _block(logits_MV)
        with on_device(logits_MV):
            logits_backward_kernel[(logits_MV.shape[0], num_blocks(logits_MV.shape[1], block))](
                logits_MV,
                out_MV,
                targets_M,
                *stats_2M,
                grad_M.to(torch.float32).contiguous(),
                logits_MV.shape[1],
                logits_MV.stride(0),
                out_MV.stride(0),
                *spec,
                HAS_SCALE=spec.scale != 1,
                HAS_SOFTCAP=spec.softcap > 0,
                BLOCK=block,
                num_warps=8,
                **COMPILED,
            )


def _rows_of_neighbours(logits_MV: Tensor) -> Tensor:
    return logits_MV if logits_MV.stride(1) == 1 else logits_MV.contiguous()


def _block(logits_MV: Tensor) -> int:
    return min(blocks_for(logits_MV.device).logits, max(16, 2 ** math.ceil(math.log2(logits_MV.shape[1]))))
