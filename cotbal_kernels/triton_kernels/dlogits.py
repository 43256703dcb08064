"""The exponentials of one vocabulary slice become the gradient of its logits.

    dz = scale (p (1 + 2 z_loss lse) - (1 - smoothing) [target] - even) slope,   p = exp(z - m) exp(m - lse)

In place where the whole vocabulary is one slice: 2 bytes read and 2 written a logit in 16 bits. Otherwise from where
they wait (1.5 bytes in bfloat16) to the slice that the products read. Plus 4 bytes per row and tile; bound by memory.
"""

# Shapes: M positions, N packed rows, V vocabulary, T vocabulary tiles.

import triton
import triton.language as tl

from .numeric import cap_slope, exponential
from .tiles import rows_here
from .twelve_bits import decode, unpack


@triton.jit
def _store(exp_TV, factor_T, even, column_TV, width, keep, row_ptr, HAS_SMOOTHING: tl.constexpr):
    """Whole tiles have no mask along the row, so stores are wide at any vocabulary size."""
    out = exp_TV * factor_T[:, None]  # 0 behind the last column
    if HAS_SMOOTHING:
        out -= tl.where(column_TV < width, even, 0.0)
    tl.store(row_ptr + column_TV, out.to(row_ptr.dtype.element_ty), mask=keep)


@triton.jit(
    do_not_specialize=["row_start", "row_count", "vocab_start", "vocab_stop"],
    do_not_specialize_on_alignment=["max_ptr", "log_sum_ptr"],
)
def dlogits_kernel(
    exp_ptr,  # [row_count, exp_stride] of this slice; PACKED: int16 words
    part_max_ptr,  # [T, row_count] float32
    target_logit_ptr,  # [row_count] float32
    rows_ptr,  # [N] int64
    num_rows_ptr,  # [1] int64
    targets_ptr,  # [M] int64
    max_ptr,  # [M] float32
    log_sum_ptr,  # [M] float32
    scale_ptr,  # [M] float32: upstream gradient times the scale of the logits
    unit_ptr,  # [2] float32: unit of the scales, and one over it
    out_ptr,  # [row_count, out_stride] out, may be exp_ptr
    row_start,
    row_count,
    vocab_start,
    vocab_stop,
    exp_stride,
    out_stride,
    softcap,
    smoothing,
    z_loss,
    even,
    PACKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    PAD_ROWS: tl.constexpr,  # rows are zeroed up to a multiple of this, for the products over rows
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    local = tl.program_id(0)
    n = rows_here(num_rows_ptr, row_start, row_count)
    if local >= tl.cdiv(n, PAD_ROWS) * PAD_ROWS:
        return
    width = vocab_stop - vocab_start
    out_row = out_ptr + local.to(tl.int64) * out_stride
    exp_row = exp_ptr + local.to(tl.int64) * exp_stride
    inner_V = tl.arange(0, BLOCK_V)
    num_tiles = tl.cdiv(width, BLOCK_V)
    padded_tiles = out_stride // BLOCK_V  # columns behind the last one are zeroed too
    if local >= n:
        for start in range(0, padded_tiles, BLOCK_T):
            tile_T = start + tl.arange(0, BLOCK_T)
            column_TV = tile_T[:, None] * BLOCK_V + inner_V[None, :]
            zeros = tl.zeros((BLOCK_T, BLOCK_V), out_ptr.dtype.element_ty)
            tl.store(out_row + column_TV, zeros, mask=(tile_T < padded_tiles)[:, None])
        return
    position = tl.load(rows_ptr + row_start + local)
    target = tl.load(targets_ptr + position).to(tl.int32) - vocab_start
    row_max = tl.load(max_ptr + position)
    log_sum = tl.load(log_sum_ptr + position)
    scale = tl.load(scale_ptr + position) * tl.load(unit_ptr + 1)
    growth = 1 + 2 * z_loss * (row_max + log_sum)
    # The target's p - 1 comes from its float32 logit: a 16-bit p of .999 would lose it.
    target_logit = tl.load(target_logit_ptr + local)
    at_target = (exponential((target_logit - row_max) - log_sum) * growth - (1 - smoothing) - even) * scale
    if HAS_SOFTCAP:
        at_target *= cap_slope(target_logit, softcap)
    first_tile = vocab_start // BLOCK_V
    for start in range(0, tl.minimum(num_tiles + 1, padded_tiles), BLOCK_T):
        tile_T = start + tl.arange(0, BLOCK_T)
        known = (tile_T < num_tiles)[:, None]
        keep = (tile_T < padded_tiles)[:, None]
        part_max_at = (first_tile + tile_T).to(tl.int64) * row_count + local
        part_max_T = tl.load(part_max_ptr + part_max_at, mask=tile_T < num_tiles, other=float("-inf"))
        factor_T = exponential((part_max_T - row_max) - log_sum) * (growth * scale)
        if PACKED:
            inner_Q = tl.arange(0, BLOCK_V // 4)
            word_TQ = tile_T[:, None] * (3 * (BLOCK_V // 4)) + inner_Q[None, :]
            first = tl.load(exp_row + word_TQ, mask=known, other=0)
            second = tl.load(exp_row + word_TQ + BLOCK_V // 4, mask=known, other=0)
            third = tl.load(exp_row + word_TQ + BLOCK_V // 2, mask=known, other=0)
            column_TQ = tile_T[:, None] * BLOCK_V + inner_Q[None, :]
            quarters = unpack(first, second, third)
            for quarter in tl.static_range(4):
                column = column_TQ + quarter * (BLOCK_V // 4)
                exp = decode(quarters[quarter])
                _store(exp, factor_T, even * scale, column, width, keep, out_row, HAS_SMOOTHING)
        else:
            column = tile_T[:, None] * BLOCK_V + inner_V[None, :]
            exp = tl.load(exp_row + column, mask=known, other=0.0).to(tl.float32)
            _store(exp, factor_T, even * scale, column, width, keep, out_row, HAS_SMOOTHING)
    if (target >= 0) & (target < width):
        tl.debug_barrier()  # another thread has stored there
        tl.store(out_row + target, at_target.to(out_ptr.dtype.element_ty))
