"""``dW = dZ^T X`` of one vocabulary slice over all rows, accumulated in float32 and rounded once: 2 N V_s D flop."""

# Shapes: M positions, N packed rows, D hidden width, V vocabulary.

import triton
import triton.language as tl

from .tiles import rows_here, tile_at


@triton.jit(do_not_specialize=["row_count", "vocab_start", "vocab_stop"])
def grad_weight_kernel(
    dlogits_ptr,  # [row_count, dlogits_stride] gradient of the logits, or its descriptor
    hidden_ptr,  # [N, D] packed rows, or their descriptor
    num_rows_ptr,  # [1] int64
    unit_ptr,  # [2] float32
    out_ptr,  # [V, D]
    row_count,
    vocab_start,
    vocab_stop,
    width,  # D
    dlogits_stride,
    ACCUMULATE: tl.constexpr,  # add to what out holds
    USE_TMA: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
):
    n = rows_here(num_rows_ptr, 0, row_count)
    vocab_width = vocab_stop - vocab_start
    row_blocks = tl.cdiv(vocab_width, BLOCK_V)
    col_blocks = tl.cdiv(width, BLOCK_D)
    unit = tl.load(unit_ptr)
    inner_M, inner_V, inner_D = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
    for index in range(tl.program_id(0), row_blocks * col_blocks, tl.num_programs(0)):
        row_block, col_block = tile_at(index, row_blocks, col_blocks, GROUP)
        start_V, start_D = row_block * BLOCK_V, col_block * BLOCK_D
        acc = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
        for start_M in range(0, n, BLOCK_M):
            if USE_TMA:  # both hold zeros behind the last row
                dlogits_MV = dlogits_ptr.load([start_M, start_V])
                hidden_MD = hidden_ptr.load([start_M, start_D])
            else:
                live_M = (inner_M < n - start_M)[:, None]
                tile_ptr = dlogits_ptr + tl.cast(start_M, tl.int64) * dlogits_stride + start_V
                at_MV = inner_M[:, None] * dlogits_stride + inner_V[None, :]
                dlogits_MV = tl.load(tile_ptr + at_MV, mask=live_M, other=0.0)  # zeros behind the slice
                tile_ptr = hidden_ptr + tl.cast(start_M, tl.int64) * width + start_D
                at_MD = inner_M[:, None] * width + inner_D[None, :]
                keep = live_M & (inner_D < width - start_D)[None, :]
                hidden_MD = tl.load(tile_ptr + at_MD, mask=keep, other=0.0)
            acc = tl.dot(dlogits_MV.T, hidden_MD, acc, input_precision="ieee")
        column_V, offset_D = start_V + inner_V, start_D + inner_D
        out_at = (vocab_start + column_V).to(tl.int64)[:, None] * width + offset_D[None, :]
        keep = (column_V < vocab_width)[:, None] & (offset_D < width)[None, :]
        acc *= unit
        if ACCUMULATE:
            acc += tl.load(out_ptr + out_at, mask=keep, other=0.0).to(tl.float32)
        tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["row_start", "row_count", "vocab_start", "vocab_stop"])
def grad_bias_kernel(
    dlogits_ptr,  # [row_count, dlogits_stride]
    num_rows_ptr,  # [1] int64
    unit_ptr,  # [2] float32
    out_ptr,  # [V] float32, in and out
    row_start,
    row_count,
    vocab_start,
    vocab_stop,
    dlogits_stride,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``db += sum of dZ over rows``: 2 bytes a logit in 16 bits."""
    n = rows_here(num_rows_ptr, row_start, row_count)
    column_V = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside_V = column_V < vocab_stop - vocab_start
    acc = tl.zeros((BLOCK_V,), tl.float32)
    for start_M in range(0, n, BLOCK_M):
        local_M = start_M + tl.arange(0, BLOCK_M)
        at_MV = local_M.to(tl.int64)[:, None] * dlogits_stride + column_V[None, :]
        keep = (local_M < n)[:, None] & inside_V[None, :]
        acc += tl.sum(tl.load(dlogits_ptr + at_MV, mask=keep, other=0.0).to(tl.float32), 0)
    out_at = out_ptr + vocab_start + column_V
    before = tl.load(out_at, mask=inside_V, other=0.0)
    tl.store(out_at, before + acc * tl.load(unit_ptr), mask=inside_V)
