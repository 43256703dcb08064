"""Loss and gradient of logits that exist, a row per program.

Forward: every logit read once, the next block while this one is summed, and one exponential for each (two would take
longer than an H200 takes to read 16 bits). Backward: read once more and the gradient written, in place if the two
pointers are the same. Both bound by memory.
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
from .numeric import cap_slope, exponential, softcapped

NUM_WARPS = 8
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32; not -inf, since -inf - -inf is not 0


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
    inner_B = tl.arange(0, BLOCK)
    best_B = tl.full((BLOCK,), LOWEST, tl.float32)
    block_B = tl.zeros((BLOCK,), tl.int32)  # where the block began that held it
    sum_B = tl.zeros((BLOCK,), tl.float32)
    target_logit = tl.load(row_ptr + target).to(tl.float32)
    if HAS_SCALE:
        target_logit *= logit_scale
    if HAS_SOFTCAP:
        target_logit = softcapped(target_logit, softcap)
    shift_B = tl.zeros((BLOCK,), tl.float32)
    following_B = tl.load(row_ptr + inner_B, mask=inner_B < vocab_size, other=float("-inf"))
    for start in range(0, vocab_size, BLOCK):
        z = following_B.to(tl.float32)
        column_B = start + BLOCK + inner_B
        following_B = tl.load(row_ptr + column_B, mask=column_B < vocab_size, other=float("-inf"))
        inside_B = inner_B < vocab_size - start
        if HAS_SCALE:
            z *= logit_scale
        if HAS_SOFTCAP:
            z = tl.where(inside_B, softcapped(z, softcap), float("-inf"))
        # What rescales the sum where this is a new maximum, and what it adds where it is none, is the same number.
        rise_B = z - best_B
        exp_B = exponential(-tl.abs(rise_B))
        sum_B = tl.where(rise_B > 0, sum_B * exp_B + 1, sum_B + exp_B)
        block_B = tl.where(rise_B > 0, start, block_B)
        if HAS_SMOOTHING:
            # relative to the target's logit, so that a common offset cancels before it is summed
            shift_B += tl.where(inside_B, z - target_logit, 0.0)
        best_B = tl.maximum(best_B, z)
    row_max = tl.max(best_B, 0)
    row_sum = tl.sum(sum_B * exponential(best_B - row_max), 0)
    argmax = tl.min(tl.where(best_B == row_max, block_B + inner_B, vocab_size), 0)
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
    scale = tl.load(scale_ptr + position)
    if HAS_SCALE:
        scale *= logit_scale
    out = exponential((z - row_max) - log_sum) * ((1 + 2 * z_loss * (row_max + log_sum)) * scale) - even * scale
    out -= tl.where(column_B == target, (1 - smoothing) * scale, 0.0)
    if HAS_SOFTCAP:
        out *= cap_slope(z, softcap)
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside_B)


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
                num_warps=NUM_WARPS,
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
                num_warps=NUM_WARPS,
                **COMPILED,
            )


def _rows_of_neighbours(logits_MV: Tensor) -> Tensor:
    return logits_MV if logits_MV.stride(1) == 1 else logits_MV.contiguous()


def _block(logits_MV: Tensor) -> int:
    """No fewer columns than threads: several would load one, and in place the first of them stores over it."""
    least = 32 * NUM_WARPS
    return min(blocks_for(logits_MV.device).logits, max(least, 2 ** math.ceil(math.log2(logits_MV.shape[1]))))
