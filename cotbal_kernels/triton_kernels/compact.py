"""One pass over labels and task ids: validation, counts per task, and the packed index of the rows to compute.

Cost: 16 M bytes read, 16 M + 8 N written. One program walks over the positions, since the place of a row is a
running count. It is bound by latency, a chain of loads, sums and barriers that should take a few microseconds per 4096
positions; the products over as many rows take milliseconds. Everything is an integer, so the counts are exact in any
order.
"""

# Shapes: M positions, N capacity of the packed index, K tasks.

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_positions", "num_tasks", "vocab_size", "ignore_index", "capacity"])
def compact_kernel(
    labels_ptr,  # [M] int64
    task_ids_ptr,  # [M] int64
    weights_ptr,  # [K] float32
    targets_ptr,  # [M] int64 out: label, -1 where not computed
    tasks_ptr,  # [M] int64 out: task id, in range
    tokens_ptr,  # [K] int64 in zeros, out: supervised positions per task
    poison_ptr,  # [] float32 out
    rows_ptr,  # [N] int64 out
    num_rows_ptr,  # [1] int64 out
    num_positions,
    num_tasks,
    vocab_size,
    ignore_index,
    capacity,
    SKIP_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    found = tl.zeros((), tl.int64)
    wrong = tl.zeros((), tl.int32)
    for start_K in range(0, num_tasks, BLOCK_K):
        tasks_K = start_K + tl.arange(0, BLOCK_K)
        weights_K = tl.load(weights_ptr + tasks_K, mask=tasks_K < num_tasks, other=0.0)
        wrong += tl.sum(((weights_K >= 0) & (weights_K < float("inf")) == 0).to(tl.int32), 0)
    for start in range(0, num_positions, BLOCK):
        at_B = start + tl.arange(0, BLOCK)
        inside_B = at_B < num_positions
        labels_B = tl.load(labels_ptr + at_B, mask=inside_B, other=0)
        task_ids_B = tl.load(task_ids_ptr + at_B, mask=inside_B, other=0)
        supervised_B = inside_B & (labels_B != ignore_index)
        tasks_B = tl.minimum(tl.maximum(task_ids_B, 0), num_tasks - 1)
        right_B = (labels_B >= 0) & (labels_B < vocab_size) & (tasks_B == task_ids_B)
        wrong += tl.sum((supervised_B & (right_B == 0)).to(tl.int32), 0)
        # Nobody reads the counts in this launch: the default order would be a fence per atomic.
        tl.atomic_add(tokens_ptr + tasks_B, tl.full((BLOCK,), 1, tl.int64), mask=supervised_B, sem="relaxed")
        computed_B = supervised_B
        if SKIP_ZERO:
            computed_B = computed_B & (tl.load(weights_ptr + tasks_B, mask=inside_B, other=0.0) != 0)
        labels_B = tl.minimum(tl.maximum(labels_B, 0), vocab_size - 1)
        tl.store(targets_ptr + at_B, tl.where(computed_B, labels_B, -1), mask=inside_B)
        tl.store(tasks_ptr + at_B, tasks_B, mask=inside_B)
        ones_B = computed_B.to(tl.int32)
        place_B = found + tl.cumsum(ones_B, 0) - 1
        tl.store(rows_ptr + place_B, at_B.to(tl.int64), mask=computed_B & (place_B < capacity))
        found += tl.sum(ones_B, 0)
    for start in range(0, capacity, BLOCK):
        at_B = start + tl.arange(0, BLOCK)
        behind_B = (at_B >= found) & (at_B < capacity)
        tl.store(rows_ptr + at_B, tl.zeros((BLOCK,), tl.int64) + num_positions, mask=behind_B)
    tl.store(num_rows_ptr, found)
    bad = (wrong > 0) | (found > capacity)
    tl.store(poison_ptr, tl.where(bad, float("nan"), 0.0))


@triton.jit(do_not_specialize=["capacity"])
def pack_kernel(
    hidden_ptr,  # [M, stride]
    rows_ptr,  # [N] int64
    num_rows_ptr,  # [1] int64
    out_ptr,  # [N, D]
    capacity,
    width,  # D
    stride,
    PAD_ROWS: tl.constexpr,  # as many rows behind the last one are zeros, for products over rows
    BLOCK: tl.constexpr,
):
    """Copy the rows to compute to one place, so that the products read them like any matrix: 4 N D bytes."""
    row = tl.program_id(0)
    n = tl.minimum(tl.load(num_rows_ptr), capacity)
    if row >= n + PAD_ROWS:  # a step of such a product may begin at any row
        return
    out_row_ptr = out_ptr + row.to(tl.int64) * width
    # A row behind the last one is zeros, whatever the last one holds.
    source_width = tl.where(row < n, width, 0)
    position = tl.load(rows_ptr + row, mask=row < n, other=0)
    for start in range(0, width, BLOCK):
        at_B = start + tl.arange(0, BLOCK)
        values_B = tl.load(hidden_ptr + position * stride + at_B, mask=at_B < source_width, other=0.0)
        tl.store(out_row_ptr + at_B, values_B, mask=at_B < width)
