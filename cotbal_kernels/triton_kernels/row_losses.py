"""From the statistics of vocabulary tiles to the loss of every row, and from there to the sums per task.

``row_losses_kernel`` reads 8 T bytes a row (12 with smoothing). Tiles are combined in ascending order, and
``task_sums_kernel`` gives each task to one program that walks over the positions in order: no atomics, so both
are bitwise reproducible.
"""

# Shapes: M positions, N packed rows, T vocabulary tiles, K tasks.

import triton
import triton.language as tl

from .numeric import exponential
from .tiles import rows_here


@triton.jit(
    do_not_specialize=["row_start", "row_count", "vocab_size"],
    do_not_specialize_on_alignment=["max_ptr", "log_sum_ptr"],
)
def row_losses_kernel(
    part_max_ptr,  # [T, row_count] float32
    part_sum_ptr,
    part_shift_ptr,
    target_logit_ptr,  # [row_count] float32, unwritten where there is no target
    target_first_ptr,  # [row_count] int32, likewise
    rows_ptr,  # [N] int64
    num_rows_ptr,  # [1] int64
    targets_ptr,  # [M] int64, -1 where a row has no target among these logits
    loss_ptr,  # [M] float32 out
    hit_ptr,  # [M] int64 out
    max_ptr,  # [M] float32 out
    log_sum_ptr,  # [M] float32 out
    row_start,
    row_count,
    vocab_size,
    smoothing,
    z_loss,
    even,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    n = rows_here(num_rows_ptr, row_start, row_count)
    if tl.program_id(0) * BLOCK_M >= n:
        return
    local_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live_M = local_M < n
    position_M = tl.load(rows_ptr + row_start + local_M, mask=live_M, other=0)
    target_M = tl.load(targets_ptr + position_M, mask=live_M, other=-1).to(tl.int32)
    has_target_M = target_M >= 0
    num_tiles = tl.cdiv(vocab_size, BLOCK_V)

    max_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((BLOCK_M,), tl.float32)
    shift_M = tl.zeros((BLOCK_M,), tl.float32)
    seen_M = tl.zeros((BLOCK_M,), tl.float32)
    first_tile_M = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, num_tiles, BLOCK_T):
        tile_T = start + tl.arange(0, BLOCK_T)
        at_TM = tile_T.to(tl.int64)[:, None] * row_count + local_M[None, :]
        keep = (tile_T < num_tiles)[:, None] & live_M[None, :]
        part_max_TM = tl.load(part_max_ptr + at_TM, mask=keep, other=float("-inf"))
        part_sum_TM = tl.load(part_sum_ptr + at_TM, mask=keep, other=0.0)
        block_max_M = tl.max(part_max_TM, 0)
        block_first_M = tl.min(tl.where(part_max_TM == block_max_M[None, :], tile_T[:, None], num_tiles), 0)
        first_tile_M = tl.where(block_max_M > max_M, block_first_M, first_tile_M)
        new_max_M = tl.where(live_M, tl.maximum(max_M, block_max_M), 0.0)
        base_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
        # exp(-inf) is 0: nothing seen yet, or a tile behind the last one
        block_sum_M = tl.sum(part_sum_TM * exponential(part_max_TM - base_M[None, :]), 0)
        sum_M = sum_M * exponential(max_M - base_M) + block_sum_M
        if HAS_SMOOTHING:
            part_shift_TM = tl.load(part_shift_ptr + at_TM, mask=keep, other=0.0)
            columns_T = tl.minimum(vocab_size - tile_T * BLOCK_V, BLOCK_V).to(tl.float32)
            drop_TM = tl.where(keep, columns_T[:, None] * (part_max_TM - new_max_M[None, :]), 0.0)
            shift_M += tl.where(seen_M > 0, seen_M * (max_M - new_max_M), 0.0) + tl.sum(part_shift_TM + drop_TM, 0)
            seen_M += tl.sum(tl.where(keep, columns_T[:, None], 0.0), 0)
        max_M = new_max_M

    log_sum_M = tl.log(sum_M)
    target_logit_M = tl.load(target_logit_ptr + local_M, mask=has_target_M, other=0.0)
    loss_M = log_sum_M - tl.where(has_target_M, (1 - smoothing) * (target_logit_M - max_M), 0.0)
    if HAS_SMOOTHING:
        loss_M -= even * shift_M
    lse_M = max_M + log_sum_M
    loss_M += z_loss * lse_M * lse_M
    target_first_M = tl.load(target_first_ptr + local_M, mask=has_target_M, other=0) > 0
    hit_M = target_first_M & (first_tile_M == target_M // BLOCK_V)
    tl.store(loss_ptr + position_M, loss_M, mask=live_M)
    tl.store(hit_ptr + position_M, hit_M.to(tl.int64), mask=live_M)
    tl.store(max_ptr + position_M, max_M, mask=live_M)
    tl.store(log_sum_ptr + position_M, log_sum_M, mask=live_M)


@triton.jit(do_not_specialize=["num_positions"])
def task_sums_kernel(
    loss_ptr,  # [M] float32, 0 where not computed
    hit_ptr,  # [M] int64
    tasks_ptr,  # [M] int64
    task_loss_ptr,  # [K] float32 out
    task_correct_ptr,  # [K] int64 out
    num_positions,
    BLOCK: tl.constexpr,
):
    """Sum of losses and hits of one task: ``BLOCK`` running sums in double precision, then a tree."""
    task = tl.program_id(0)
    loss_B = tl.zeros((BLOCK,), tl.float64)
    hit_B = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, num_positions, BLOCK):
        at_B = start + tl.arange(0, BLOCK)
        mine_B = at_B < num_positions
        mine_B = mine_B & (tl.load(tasks_ptr + at_B, mask=mine_B, other=-1) == task)
        loss_B += tl.load(loss_ptr + at_B, mask=mine_B, other=0.0).to(tl.float64)
        hit_B += tl.load(hit_ptr + at_B, mask=mine_B, other=0)
    tl.store(task_loss_ptr + task, tl.sum(loss_B, 0).to(tl.float32))
    tl.store(task_correct_ptr + task, tl.sum(hit_B, 0))
