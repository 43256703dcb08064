"""``dX += dZ W`` over one vocabulary slice: 2 N V_s D flop.

dX is float32, which is what waits for the backward pass, and takes the slices in descending order; a slice adds
8 N D bytes of traffic to the product's own.
"""

# Shapes: M positions, N packed rows, D hidden width, V vocabulary.

import triton
import triton.language as tl

from .tiles import parts_of, rows_here, tile_at


@triton.jit
def _add(row_ptr, live_M, start_D, width, values, BLOCK: tl.constexpr):
    offset_D = start_D + tl.arange(0, BLOCK)
    at = row_ptr[:, None] + offset_D[None, :]
    keep = live_M[:, None] & (offset_D < width)[None, :]
    tl.store(at, tl.load(at, mask=keep, other=0.0) + values, mask=keep)


@triton.jit(do_not_specialize=["row_start", "row_count", "vocab_start", "vocab_stop"])
def grad_hidden_kernel(
    dlogits_ptr,  # [row_count, dlogits_stride], zeros behind the slice, or its tensor descriptor
    weight_ptr,  # [V, D], or its tensor descriptor
    rows_ptr,  # [N] int64
    num_rows_ptr,  # [1] int64
    unit_ptr,  # [2] float32
    out_ptr,  # [M, D] float32, in and out
    row_start,
    row_count,
    vocab_start,
    vocab_stop,
    width,  # D
    dlogits_stride,
    weight_stride,
    USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    n = rows_here(num_rows_ptr, row_start, row_count)
    row_blocks = tl.cdiv(n, BLOCK_M)
    col_blocks = tl.cdiv(width, BLOCK_D)
    unit = tl.load(unit_ptr)
    inner_M, inner_V, inner_D = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
    for index in range(tl.program_id(0), row_blocks * col_blocks, tl.num_programs(0)):
        row_block, col_block = tile_at(index, row_blocks, col_blocks, GROUP)
        local_M = row_block * BLOCK_M + inner_M
        live_M = local_M < n
        inside_D = inner_D < width - col_block * BLOCK_D
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start_V in range(0, vocab_stop - vocab_start, BLOCK_V):
            if USE_TMA:
                dlogits_MV = dlogits_ptr.load([row_block * BLOCK_M, start_V])
                weight_VD = weight_ptr.load([vocab_start + start_V, col_block * BLOCK_D])
            else:
                inside_V = inner_V < vocab_stop - vocab_start - start_V
                tile_ptr = dlogits_ptr + (row_block * BLOCK_M).to(tl.int64) * dlogits_stride + start_V
                at_MV = inner_M[:, None] * dlogits_stride + inner_V[None, :]
                dlogits_MV = tl.load(tile_ptr + at_MV, mask=live_M[:, None], other=0.0)
                tile_ptr = weight_ptr + (vocab_start + start_V).to(tl.int64) * weight_stride + col_block * BLOCK_D
                at_VD = inner_V[:, None] * weight_stride + inner_D[None, :]
                weight_VD = tl.load(tile_ptr + at_VD, mask=inside_V[:, None] & inside_D[None, :], other=0.0)
            acc = tl.dot(dlogits_MV, weight_VD, acc, input_precision="ieee")
        position_M = tl.load(rows_ptr + row_start + local_M, mask=live_M, other=0)
        row_ptr = out_ptr + position_M * width
        BLOCK: tl.constexpr = BLOCK_D // PARTS
        parts = parts_of(acc, BLOCK_M, BLOCK_D, PARTS)
        for part in tl.static_range(PARTS):
            _add(row_ptr, live_M, col_block * BLOCK_D + part * BLOCK, width, parts[part] * unit, BLOCK)
