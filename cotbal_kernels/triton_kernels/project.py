"""``hidden @ weight.T`` tile by tile, each tile reduced on the spot: the logits are never written.

    z = hidden weight^T + bias, scaled and soft-capped;   per row and tile: m = max z,  l = sum exp(z - m)

What else a tile leaves behind depends on WRITE:

    WRITE_NONE          nothing: the loss alone, 2 N V D flop, 8 N T bytes of statistics
    WRITE_EXP           exp(z - m), times the slope of the soft cap, in the dtype of hidden: 2 bytes a logit.
                        Relative to its tile's maximum a 16-bit exponential keeps 8 bits of the probability at any
                        offset; the logit itself in 16 bits would not.
    WRITE_PACKED        the same in 12 bits, see :mod:`.twelve_bits`: 1.5 bytes
    WRITE_GRADIENT      the gradient of the logits, from row statistics that are already known (recomputation)

Bytes read per tile: BLOCK_M + BLOCK_V rows of D. Programs are persistent, and the number of rows is read from
device memory, so ignored positions cost nothing and the host never waits for their number.
"""

# Shapes: M positions, N packed rows, D hidden width, V vocabulary, T parts of it with statistics of their own, each a
# tile or (PARTS = 2) half of one.

import triton
import triton.language as tl

from .numeric import cap_slope, exponential, softcapped
from .tiles import parts_of, rows_here, tile_at
from .twelve_bits import pack

WRITE_NONE = tl.constexpr(0)
WRITE_EXP = tl.constexpr(1)
WRITE_PACKED = tl.constexpr(2)
WRITE_GRADIENT = tl.constexpr(3)


@triton.jit
def _finish(
    z,  # [BLOCK_M, BLOCK] products
    first_V,
    column,  # of first_V in its slice of out
    local_M,
    live_M,
    position_M,
    part,  # index in [0, T) of this block of columns
    bias_ptr,
    targets_ptr,
    part_max_ptr,
    part_sum_ptr,
    part_shift_ptr,
    target_logit_ptr,
    target_first_ptr,
    max_ptr,
    log_sum_ptr,
    scale_ptr,
    unit_ptr,
    out_ptr,
    row_count,
    vocab_stop,
    vocab_size,
    out_stride,
    softcap,
    smoothing,
    z_loss,
    logit_scale,
    even,
    WRITE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From a block of products to what is kept of it."""
    vocab_V = first_V + tl.arange(0, BLOCK)
    inside_V = vocab_V < vocab_stop
    if HAS_BIAS:
        z += tl.load(bias_ptr + vocab_V, mask=inside_V, other=0.0).to(tl.float32)[None, :]
    if HAS_SCALE:
        z *= logit_scale
    if HAS_SOFTCAP:
        z = softcapped(z, softcap)
    z = tl.where(inside_V[None, :], z, float("-inf"))
    target_M = tl.load(targets_ptr + position_M, mask=live_M, other=-1).to(tl.int32)
    holds_M = live_M & (target_M >= first_V) & (target_M < tl.minimum(first_V + BLOCK, vocab_stop))
    holds_some = tl.max(holds_M.to(tl.int32), 0) > 0  # three tiles in four hold no target of their rows

    if WRITE == WRITE_GRADIENT:
        max_M = tl.load(max_ptr + position_M, mask=live_M, other=0.0)
        log_sum_M = tl.load(log_sum_ptr + position_M, mask=live_M, other=0.0)
        scale_M = tl.load(scale_ptr + position_M, mask=live_M, other=0.0) * tl.load(unit_ptr + 1)
        # Two small differences, never z - lse, where a large offset would eat the digits.
        out = exponential((z - max_M[:, None]) - log_sum_M[:, None])
        out *= ((1 + 2 * z_loss * (max_M + log_sum_M)) * scale_M)[:, None]
        # The target's p - 1 is formed in float32, before any rounding.
        # No branch with a soft cap: z and out would both have to live through it, in 256 registers.
        if HAS_SOFTCAP | holds_some:
            out -= tl.where(vocab_V[None, :] == target_M[:, None], ((1 - smoothing) * scale_M)[:, None], 0.0)
        if HAS_SMOOTHING:
            out -= (even * scale_M)[:, None]
        if HAS_SOFTCAP:
            out *= cap_slope(z, softcap)
        # Rows and columns behind the last one become zeros, which the products read; columns without options are, by
        # exp(-inf), and with them one mask for both spills less than one for the rows.
        if HAS_SMOOTHING or HAS_SOFTCAP:
            out = tl.where(live_M[:, None] & inside_V[None, :], out, 0.0)
        else:
            out = tl.where(live_M[:, None], out, 0.0)
        keep_M = local_M < row_count
    else:
        max_M = tl.max(z, 1)
        base_M = tl.where(max_M == float("-inf"), 0.0, max_M)  # words that a bias of -inf forbids
        at_M = part.to(tl.int64) * row_count + local_M
        tl.store(part_max_ptr + at_M, max_M, mask=live_M)
        if holds_some:
            is_target = vocab_V[None, :] == target_M[:, None]
            target_logit_M = tl.sum(tl.where(is_target, z, 0.0), 1)
            first_argmax_M = tl.min(tl.where(z == max_M[:, None], vocab_V[None, :], vocab_size), 1)
            tl.store(target_logit_ptr + local_M, target_logit_M, mask=holds_M)
            tl.store(target_first_ptr + local_M, (first_argmax_M == target_M).to(tl.int32), mask=holds_M)
        if HAS_SMOOTHING:
            shift_M = tl.sum(tl.where(inside_V[None, :], z - max_M[:, None], 0.0), 1)
            tl.store(part_shift_ptr + at_M, shift_M, mask=live_M)
        out = exponential(z - base_M[:, None])
        tl.store(part_sum_ptr + at_M, tl.sum(out, 1), mask=live_M)
        if HAS_SOFTCAP:
            out *= cap_slope(z, softcap)
        keep_M = live_M
    # Rows are padded to whole tiles: no mask along them, so the stores are wide at any vocabulary size.
    if WRITE == WRITE_PACKED:
        first, second, third = pack(out, BLOCK_M, BLOCK)
        QUARTER: tl.constexpr = BLOCK // 4
        word = column // BLOCK * (3 * QUARTER) + tl.arange(0, QUARTER)
        word_at = local_M.to(tl.int64)[:, None] * out_stride + word[None, :]
        tl.store(out_ptr + word_at, first, mask=keep_M[:, None])
        tl.store(out_ptr + word_at + QUARTER, second, mask=keep_M[:, None])
        tl.store(out_ptr + word_at + 2 * QUARTER, third, mask=keep_M[:, None])
    elif WRITE != WRITE_NONE:
        out_at = local_M.to(tl.int64)[:, None] * out_stride + (column + tl.arange(0, BLOCK))[None, :]
        tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=keep_M[:, None])


# Statistics of positions are rows of one matrix: where they are aligned depends on the number of positions.
@triton.jit(
    do_not_specialize=["row_start", "row_count", "vocab_start", "vocab_stop"],
    do_not_specialize_on_alignment=["max_ptr", "log_sum_ptr"],
)
def project_kernel(
    hidden_ptr,  # [N, D] packed rows, or their tensor descriptor
    weight_ptr,  # [V, D], or its tensor descriptor
    bias_ptr,  # [V]
    rows_ptr,  # [N] int64 positions of the packed rows
    num_rows_ptr,  # [1] int64
    targets_ptr,  # [M] int64, -1 where a row has no target among these logits
    part_max_ptr,  # [T, row_count] float32 out, but for WRITE_GRADIENT
    part_sum_ptr,  # [T, row_count] float32 out
    part_shift_ptr,  # [T, row_count] float32 out: sum of z - m, for smoothing
    target_logit_ptr,  # [row_count] float32 out
    target_first_ptr,  # [row_count] int32 out: whether the target is the first argmax of its tile
    max_ptr,  # [M] float32 (WRITE_GRADIENT)
    log_sum_ptr,  # [M] float32
    scale_ptr,  # [M] float32: upstream gradient times logit_scale
    unit_ptr,  # [2] float32: unit of the scales, and one over it
    out_ptr,  # [slices, row_count, out_stride], one slice with WRITE_GRADIENT; WRITE_PACKED: int16 words
    row_start,
    row_count,
    vocab_start,
    vocab_stop,
    vocab_size,
    width,  # D
    weight_stride,
    out_stride,
    softcap,
    smoothing,
    z_loss,
    logit_scale,
    even,
    WRITE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    n = rows_here(num_rows_ptr, row_start, row_count)
    row_blocks = tl.cdiv(n, BLOCK_M)
    col_blocks = tl.cdiv(vocab_stop - vocab_start, BLOCK_V)
    inner_M, inner_V, inner_D = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
    for index in range(tl.program_id(0), row_blocks * col_blocks, tl.num_programs(0)):
        row_block, col_block = tile_at(index, row_blocks, col_blocks, GROUP)
        local_M = row_block * BLOCK_M + inner_M
        live_M = local_M < n
        position_M = tl.load(rows_ptr + row_start + local_M, mask=live_M, other=0)
        first_V = vocab_start + col_block * BLOCK_V
        z = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for start_D in range(0, width, BLOCK_D):
            if USE_TMA:
                hidden_MD = hidden_ptr.load([row_start + row_block * BLOCK_M, start_D])
                weight_VD = weight_ptr.load([first_V, start_D])
            else:
                inside_D = (inner_D < width - start_D)[None, :]
                tile_ptr = hidden_ptr + (row_start + row_block * BLOCK_M).to(tl.int64) * width + start_D
                at_MD = inner_M[:, None] * width + inner_D[None, :]
                hidden_MD = tl.load(tile_ptr + at_MD, mask=live_M[:, None] & inside_D, other=0.0)
                tile_ptr = weight_ptr + first_V.to(tl.int64) * weight_stride + start_D
                at_VD = inner_V[:, None] * weight_stride + inner_D[None, :]
                inside_V = (inner_V < vocab_stop - first_V)[:, None]
                weight_VD = tl.load(tile_ptr + at_VD, mask=inside_V & inside_D, other=0.0)
            z = tl.dot(hidden_MD, weight_VD.T, z, input_precision="ieee")
        slice_ptr, slice_block = out_ptr, col_block
        if (WRITE == WRITE_EXP) | (WRITE == WRITE_PACKED):
            blocks = (out_stride // 3 * 4 if WRITE == WRITE_PACKED else out_stride) // BLOCK_V
            slice_ptr += (col_block // blocks).to(tl.int64) * row_count * out_stride
            slice_block = col_block % blocks
        column = slice_block * BLOCK_V  # a multiple that the compiler sees: stores are 16 bytes wide
        BLOCK: tl.constexpr = BLOCK_V // PARTS
        parts = parts_of(z, BLOCK_M, BLOCK_V, PARTS)
        for part in tl.static_range(PARTS):
            # The second half of the last tile may lie behind the vocabulary; its gradient is zeros that products read.
            if part == 0 or WRITE == WRITE_GRADIENT or first_V + part * BLOCK < vocab_stop:
                _finish(
                    parts[part], first_V + part * BLOCK, column + part * BLOCK, local_M, live_M, position_M,
                    PARTS * col_block + part, bias_ptr, targets_ptr, part_max_ptr, part_sum_ptr, part_shift_ptr,
                    target_logit_ptr, target_first_ptr, max_ptr, log_sum_ptr, scale_ptr, unit_ptr, slice_ptr,
                    row_count, vocab_stop, vocab_size, out_stride, softcap, smoothing, z_loss, logit_scale, even,
                    WRITE, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, HAS_SMOOTHING, BLOCK_M, BLOCK,
                )  # fmt: skip
