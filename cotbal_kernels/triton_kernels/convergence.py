"""The step of the convergence balancer in one launch: ``convergence_update.update`` for a GPU.

One program per row of the rings records this step's ratio and fits the slope, so the work that grows with tasks and
window, K x N, is spread over the device. The program that finishes last, whichever it is, turns slopes into weights and
advances the step counter: no second launch and nothing to wait for. Rows and sums have a fixed order, so results do not
depend on who is last.
"""

# Shapes: K tasks, N window, H history.

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..convergence_update import MAX_RATIO, MAX_SCALE, Settings, State
from .configs import COMPILED

NUM_WARPS = 8  # with 4, the pass over 2048 peaks spills

_MAX_RATIO: tl.constexpr = tl.constexpr(MAX_RATIO)
_MAX_SCALE: tl.constexpr = tl.constexpr(MAX_SCALE)


@triton.jit
def _scale(factor, total):
    """factor / total, at most MAX_SCALE; 0 where the total is 0, which makes a softmax uniform."""
    zero = total == 0.0
    quotient = factor / tl.where(zero, 1.0, total)
    return tl.where(zero, 0.0, tl.minimum(tl.maximum(quotient, -_MAX_SCALE), _MAX_SCALE))


@triton.jit
def _softmax(logits, mask):
    logits = tl.where(mask, logits, float("-inf"))
    numerator = tl.exp(logits - tl.max(logits, 0))
    return numerator / tl.sum(numerator, 0)


@triton.jit
def _ratios(losses_ptr, stride, present_ptr, initial_ptr, task, mask, MFTCODER: tl.constexpr):
    """r_i(t) of the tasks, whether to record it, and L_i(0). Tasks outside ``mask`` are not recorded.

    May run while another program stores L_i(0) = L_i(t): before or after, the ratio is 1.
    """
    loss = tl.load(losses_ptr + task * stride, mask=mask, other=0.0).to(tl.float64)
    initial = tl.load(initial_ptr + task, mask=mask, other=0.0)
    initial = tl.where(initial > 0, initial, loss)
    divisible = initial > 0
    ratio = loss / tl.where(divisible, initial, 1.0)
    seen = mask & divisible & (tl.abs(ratio) <= _MAX_RATIO)  # false for NaN
    if present_ptr is not None:
        seen = seen & (tl.load(present_ptr + task, mask=mask, other=0) != 0)
    if MFTCODER:
        seen = seen & (loss != 0.0)
    return ratio, seen, initial


@triton.jit
def _fit(ratio_steps_ptr, ratios_ptr, count, t, window, MFTCODER: tl.constexpr, BLOCK_N: tl.constexpr):
    """Slope of one row of the rings (Eq. 2, 3), float64; both axes are shifted before anything is multiplied."""
    column = tl.arange(0, BLOCK_N)
    newest = (count + window - 1) % window
    newest_ratio = tl.load(ratios_ptr + newest)
    points = tl.zeros([BLOCK_N], tl.float64)
    x_sum = tl.zeros([BLOCK_N], tl.float64)
    xx_sum = tl.zeros([BLOCK_N], tl.float64)
    xy_sum = tl.zeros([BLOCK_N], tl.float64)
    mean = tl.zeros([], tl.float64)
    for centred in tl.static_range(2):
        for start in range(0, window, BLOCK_N):
            slot = start + column
            kept = (slot < window) & (slot < count)
            step = tl.load(ratio_steps_ptr + slot, mask=kept, other=0)
            if MFTCODER:
                kept = kept & (step > t - window)
                x = -((newest - slot + window) % window).to(tl.float64)
            else:
                x = (step - t).to(tl.float64)
            if centred == 0:
                points += tl.where(kept, 1.0, 0.0)
                x_sum += tl.where(kept, x, 0.0)
            else:
                x = tl.where(kept, x - mean, 0.0)
                y = tl.load(ratios_ptr + slot, mask=kept, other=0.0) - newest_ratio
                xx_sum += x * x
                xy_sum += x * y
        if centred == 0:
            mean = tl.sum(x_sum, 0) / tl.maximum(tl.sum(points, 0), 1.0)
    fits = tl.sum(points, 0) >= 2.0
    return tl.where(fits, tl.sum(xy_sum, 0) / tl.where(fits, tl.sum(xx_sum, 0), 1.0), 0.0)


@triton.jit
def _sum_of_slopes(slope_ring_ptr, newest, number, window, BLOCK_N: tl.constexpr):
    """Sum of the absolute values of the ``number`` newest entries of one row, float64."""
    column = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float64)
    for start in range(0, window, BLOCK_N):
        slot = start + column
        kept = (slot < window) & ((newest - slot + window) % window < number)
        total += tl.abs(tl.load(slope_ring_ptr + slot, mask=kept, other=0.0))
    return tl.sum(total, 0)


@triton.jit
def _divergence_factor(
    peaks_ptr,
    peak,
    number,
    TEMPERATURE: tl.constexpr,
    SIGNED: tl.constexpr,
    MFTCODER: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """DF(t) of Eq. 7 from the first ``number`` peaks, of which ``peak`` is the newest; float64."""
    column = tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], tl.float64)
    lowest = tl.zeros([BLOCK_H], tl.float64) + peak
    highest = tl.zeros([BLOCK_H], tl.float64) + peak
    for start in range(0, number, BLOCK_H):
        kept = start + column < number
        a = tl.load(peaks_ptr + start + column, mask=kept, other=0.0)
        total += a if SIGNED else tl.abs(a)
        lowest = tl.minimum(lowest, tl.where(kept, a, peak))
        highest = tl.maximum(highest, tl.where(kept, a, peak))
    scale = -TEMPERATURE * _scale(number.to(tl.float64), tl.sum(total, 0))
    largest = tl.maximum(tl.min(lowest, 0) * scale, tl.max(highest, 0) * scale)
    terms = tl.zeros([BLOCK_H], tl.float64)
    for start in range(0, number, BLOCK_H):
        kept = start + column < number
        a = tl.load(peaks_ptr + start + column, mask=kept, other=0.0)
        terms += tl.where(kept, tl.exp(a * scale - largest), 0.0)
    factor = number.to(tl.float64) * tl.exp(peak * scale - largest) / tl.sum(terms, 0)
    return factor if MFTCODER else tl.minimum(factor, 1.0)


@triton.jit
def _weights(alpha, absolute_logits, divergence, num_tasks, mask, MFTCODER: tl.constexpr):
    """K w_i(t) from Eq. 4 and 6; ``absolute_logits`` is what Eq. 5 takes the softmax of."""
    tasks = num_tasks.to(tl.float64)
    relative = _softmax(alpha * _scale(tasks, tl.sum(tl.where(mask, tl.abs(alpha), 0.0), 0)), mask)
    weights = divergence * relative + (1.0 - divergence) * _softmax(absolute_logits, mask)
    if MFTCODER:
        weights = _softmax(weights * tasks, mask)
        floor = 0.1 / tasks
        too_low = tl.min(tl.where(mask, weights, 1.0), 0) < floor
        weights = tl.where(too_low, 0.9 * weights + floor, weights)
    return weights * tasks


# Numbers stay run-time arguments: an argument of 1 would become a constant, which has no type to convert.
@triton.jit(do_not_specialize=["stride", "num_tasks", "window", "history", "warmup", "slopes_kept"])
def convergence_step_kernel(
    losses_ptr,  # [K] floating point, any stride
    stride,
    present_ptr,  # [K] bool as uint8, contiguous, or None
    step_ptr,  # the fields of State from here ...
    counts_ptr,
    initial_ptr,
    ratio_steps_ptr,
    ratios_ptr,
    slopes_ptr,
    slope_ring_ptr,
    peaks_ptr,
    weights_ptr,  # ... to here
    logits_ptr,  # [K] float64, scratch: from every program to the last one
    arrivals_ptr,  # [] int32, scratch: programs that are done; 0 between launches
    output_ptr,  # [K] float32
    num_tasks,
    window,
    history,
    warmup,
    slopes_kept,
    TEMPERATURE: tl.constexpr,
    MFTCODER: tl.constexpr,
    PRINTED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0)
    t = tl.load(step_ptr)
    tasks = tl.arange(0, BLOCK_K)
    mask = tasks < num_tasks

    if row < num_tasks:
        ratio, seen, initial = _ratios(losses_ptr, stride, present_ptr, initial_ptr, row, row < num_tasks, MFTCODER)
    else:  # the envelope, max over the tasks
        ratio_K, seen_K, _initial_K = _ratios(losses_ptr, stride, present_ptr, initial_ptr, tasks, mask, MFTCODER)
        ratio = tl.max(tl.where(seen_K, ratio_K, float("-inf")), 0)
        seen = ratio > float("-inf")
        initial = ratio
    has_initial = seen
    if MFTCODER:
        seen = seen & (t >= 2)

    count = tl.load(counts_ptr + row)
    alpha = tl.load(slopes_ptr + row)
    ring = row.to(tl.int64) * window
    tl.store(ratio_steps_ptr + ring + count % window, t, mask=seen)
    tl.store(ratios_ptr + ring + count % window, ratio, mask=seen)
    # One thread stores what all threads read: here the rings are written, and L_i(0), the old count and slope have been
    # read.
    tl.debug_barrier()
    count += seen.to(tl.int64)
    tl.store(counts_ptr + row, count)
    fitted = _fit(ratio_steps_ptr + ring, ratios_ptr + ring, count, t, window, MFTCODER, BLOCK_N)
    alpha = fitted if MFTCODER else tl.where(seen, fitted, alpha)
    tl.store(slopes_ptr + row, alpha)

    if row < num_tasks:
        tl.store(initial_ptr + row, initial, mask=has_initial)
        if MFTCODER:  # one slope per step from W on, whether the task was present or not
            age = t - warmup
            newest = tl.maximum(age, 0) % window
            number = tl.minimum(age + 1, slopes_kept)
            tl.store(slope_ring_ptr + ring + newest, alpha, mask=age >= 0)
        else:  # one slope per presence, beside its ratio
            newest = (count + window - 1) % window
            number = tl.minimum(count, window)
            tl.store(slope_ring_ptr + ring + newest, alpha, mask=seen)
        tl.debug_barrier()
        total = _sum_of_slopes(slope_ring_ptr + ring, newest, number, window, BLOCK_N)
        factor = number
        if PRINTED:
            factor = number * 0 + window
        tl.store(logits_ptr + row, -alpha * _scale(factor.to(tl.float64), total))

    tl.debug_barrier()  # everything this program stores comes before it is counted
    if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        # ".cg" skips the first-level cache, which does not see what other programs stored.
        alpha_K = tl.load(slopes_ptr + tasks, mask=mask, other=0.0, cache_modifier=".cg")
        logits_K = tl.load(logits_ptr + tasks, mask=mask, other=0.0, cache_modifier=".cg")
        if MFTCODER:
            age = t - warmup
            peak = tl.load(slopes_ptr + num_tasks, cache_modifier=".cg")
        else:
            age = t - 1
            count_K = tl.load(counts_ptr + tasks, mask=mask, other=0, cache_modifier=".cg")
            peak = tl.max(tl.where(count_K >= 2, alpha_K, float("-inf")), 0)
            peak = tl.where(peak > float("-inf"), peak, 0.0)  # no task has a slope yet
        tl.store(peaks_ptr + tl.maximum(age, 0) % history, peak, mask=age >= 0)
        tl.debug_barrier()
        weights_K = tl.where(mask, 1.0, 0.0).to(tl.float64)
        if age >= (0 if MFTCODER else warmup):
            number = tl.minimum(age + 1, history)
            divergence = _divergence_factor(peaks_ptr, peak, number, TEMPERATURE, PRINTED, MFTCODER, BLOCK_H)
            weights_K = _weights(alpha_K, logits_K, divergence, num_tasks, mask, MFTCODER)
        tl.store(weights_ptr + tasks, weights_K.to(tl.float32), mask=mask)
        tl.store(output_ptr + tasks, weights_K.to(tl.float32), mask=mask)
        tl.store(step_ptr, t + 1)
        tl.store(arrivals_ptr, 0)


class ConvergenceKernel:
    """Launches the kernel; takes the place of ``convergence_update.update`` for one balancer."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        if device.type != "cuda" and not triton.knobs.runtime.interpret:
            raise ValueError(
                f"backend='triton' needs a balancer on a CUDA device (or Triton's interpreter), got {device}"
            )
        self.settings = settings
        self.logits = torch.empty(settings.num_tasks, dtype=torch.float64, device=device)
        self.arrivals = torch.zeros((), dtype=torch.int32, device=device)
        self.constants = {
            "TEMPERATURE": settings.temperature,
            "MFTCODER": settings.mftcoder,
            "PRINTED": settings.variant == "printed",
            "BLOCK_K": triton.next_power_of_2(settings.num_tasks),
            "BLOCK_N": min(triton.next_power_of_2(settings.window), 1024),
            "BLOCK_H": min(triton.next_power_of_2(settings.history), 2048),
        }

    def __call__(self, state: State, val_losses: Tensor, present: Tensor | None) -> Tensor:
        settings = self.settings
        output = torch.empty_like(state.weights)
        with torch.cuda.device(output.device) if output.is_cuda else nullcontext():
            convergence_step_kernel[(settings.rows,)](
                val_losses,
                val_losses.stride(0),
                None if present is None else present.contiguous().view(torch.uint8),
                *state.tensors().values(),
                self.logits,
                self.arrivals,
                output,
                settings.num_tasks,
                settings.window,
                settings.history,
                settings.warmup,
                settings.slopes_kept,
                **self.constants,
                num_warps=NUM_WARPS,
                **COMPILED,
            )
        return output
