"""From lambda and the counts to what the gradient of every row's logits is multiplied by, in two small launches.

PyTorch takes thirty for the same. One program each: K tasks and N rows are nothing beside a product, and sums and
largest values then have one order.
"""

# Shapes: M positions, N packed rows (the capacity), K tasks.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COMPILED, blocks_for


@triton.jit(do_not_specialize=["num_tasks"])
def task_scales_kernel(
    weights_ptr,  # [K] float32, lambda
    tokens_ptr,  # [K] int64
    poison_ptr,  # [] float32: 0 or NaN
    normalizer_ptr,  # [] float32, or [K] with PER_TASK; None: that of these tokens
    scale_ptr,  # [K] float32 out
    denominator_ptr,  # [K] float32 out
    num_tasks,
    PER_TASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    poison = tl.load(poison_ptr)
    total_B = tl.zeros((BLOCK,), tl.float32)
    if normalizer_ptr is None:
        for start in range(0, num_tasks, BLOCK):
            task_B = start + tl.arange(0, BLOCK)
            inside_B = task_B < num_tasks
            weights_B = tl.load(weights_ptr + task_B, mask=inside_B, other=0.0)
            tokens_B = tl.load(tokens_ptr + task_B, mask=inside_B, other=0).to(tl.float32)
            if PER_TASK:
                total_B += tl.where(tokens_B > 0, weights_B, 0.0)
            else:
                total_B += weights_B * tokens_B
    total = tl.sum(total_B, 0) + poison
    for start in range(0, num_tasks, BLOCK):
        task_B = start + tl.arange(0, BLOCK)
        inside_B = task_B < num_tasks
        weights_B = tl.load(weights_ptr + task_B, mask=inside_B, other=0.0) + poison
        denominator_B = tl.zeros((BLOCK,), tl.float32)
        if normalizer_ptr is None:
            denominator_B += total
            if PER_TASK:
                denominator_B *= tl.load(tokens_ptr + task_B, mask=inside_B, other=0).to(tl.float32)
        elif PER_TASK:
            denominator_B += tl.load(normalizer_ptr + task_B, mask=inside_B, other=0.0)
        else:
            denominator_B += tl.load(normalizer_ptr)
        right_B = (denominator_B >= 0) & (denominator_B < float("inf"))
        denominator_B = tl.where(right_B, denominator_B, float("nan"))
        empty_B = denominator_B == 0
        scale_B = tl.where(empty_B, 0.0, tl.div_rn(weights_B, tl.where(empty_B, 1.0, denominator_B)))
        tl.store(scale_ptr + task_B, scale_B, mask=inside_B)
        tl.store(denominator_ptr + task_B, denominator_B, mask=inside_B)


@triton.jit(do_not_specialize=["capacity"])
def row_scales_kernel(
    source_ptr,  # [K] of every task, or [M] of every position where tasks_ptr is None
    tasks_ptr,  # [M] int64, or None
    rows_ptr,  # [N] int64
    num_rows_ptr,  # [1] int64
    scale_ptr,  # [M] float32 out, at the positions of the rows only
    unit_ptr,  # [2] float32 out: the power of two from the largest scale on, at least 2^-100; and one over it
    capacity,
    logit_scale,
    BLOCK: tl.constexpr,
):
    num_rows = tl.minimum(tl.load(num_rows_ptr), capacity).to(tl.int32)
    largest_B = tl.full((BLOCK,), 2.0**-100, tl.float32)
    for start in range(0, num_rows, BLOCK):
        at_B = start + tl.arange(0, BLOCK)
        inside_B = at_B < num_rows
        position_B = tl.load(rows_ptr + at_B, mask=inside_B, other=0)
        source_B = position_B
        if tasks_ptr is not None:
            source_B = tl.load(tasks_ptr + position_B, mask=inside_B, other=0)
        scale_B = tl.load(source_ptr + source_B, mask=inside_B, other=0.0).to(tl.float32) * logit_scale
        tl.store(scale_ptr + position_B, scale_B, mask=inside_B)
        largest_B = tl.maximum(largest_B, tl.abs(scale_B))  # a NaN is nobody's unit but its own row's
    bits = tl.max(largest_B, 0).to(tl.int32, bitcast=True)
    # Rounded up to a power of two by its exponent; 253 is the last one whose inverse is not denormal.
    exponent = tl.minimum((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32), 253)
    tl.store(unit_ptr, (exponent << 23).to(tl.float32, bitcast=True))
    tl.store(unit_ptr + 1, ((254 - exponent) << 23).to(tl.float32, bitcast=True))


class Scale(NamedTuple):
    """What the gradient of every row's logits is multiplied by, and the power of two that the kernels take out of it.

    Gradients of logits are rounded to the dtype of hidden relative to it: a float16 would lose a weight
    divided by 1e6 tokens.
    """

    scale_M: Tensor  # float32, written at the positions of the rows only
    unit_2: Tensor

    @classmethod
    def of(
        cls,
        source: Tensor,
        tasks_M: Tensor | None,
        rows_N: Tensor,
        num_rows: Tensor,
        size: int,
        logit_scale: float = 1.0,
    ) -> "Scale":
        """Upstream gradient of every row's loss, times the scale of the logits.

        Args:
            source: ``[K]`` of every task, or ``[M]`` of every position if ``tasks_M`` is None; it does not matter
                what it holds at positions that are no row.
            size: M.
        """
        scale = cls(*(source.new_empty(shape, dtype=torch.float32) for shape in (size, 2)))
        row_scales_kernel[(1,)](
            source.contiguous(),
            tasks_M,
            rows_N,
            num_rows,
            *scale,
            rows_N.shape[0],
            logit_scale,
            BLOCK=blocks_for(source.device).row_scales,
            num_warps=8,
            **COMPILED,
        )
        return scale
