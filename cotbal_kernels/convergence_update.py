"""One step of the convergence balancer in PyTorch, and the state it changes; reads like Eq. 2-7 of CoBa.

The equations are in the docstring of ``convergence.ConvergenceBalancer``; ``triton_kernels/convergence.py`` computes
the same in one launch.
"""

# Shapes: K tasks, R rows of the rings (K, or K + 1 with the envelope of "mftcoder"), N window, H history.

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

# Ratios beyond this count as absent, and no scale exceeds the other, so no product of the two is infinite.
MAX_RATIO = 1e100
MAX_SCALE = 1e200


@dataclass(frozen=True)
class Settings:
    """What a balancer was built with; two balancers continue each other only if all of it is equal."""

    num_tasks: int
    window: int
    warmup: int
    temperature: float
    variant: str
    history: int

    @property
    def rows(self) -> int:
        """R: rings of losses that are fitted. "mftcoder" fits the envelope of the tasks too."""
        return self.num_tasks + self.mftcoder

    @property
    def mftcoder(self) -> bool:
        return self.variant == "mftcoder"

    @property
    def first_peak(self) -> int:
        """First step j whose largest slope a(j) enters Eq. 7."""
        return self.warmup if self.mftcoder else 1

    @property
    def first_weighted(self) -> int:
        """First step whose weights are not uniform."""
        return self.warmup if self.mftcoder else self.warmup + 1

    @property
    def slopes_kept(self) -> int:
        """Most slopes of a task in Eq. 5. N - W + 1 of the authors' code is from 1 to N wherever that code runs."""
        return min(max(self.window - self.warmup + 1, 1), self.window) if self.mftcoder else self.window


@dataclass
class State:
    """Everything that changes from step to step; the size is fixed and every update is in place."""

    step: Tensor  # [] int64, t: calls so far
    counts: Tensor  # [R] int64, ratios recorded so far; the newest is in slot (count - 1) % N of its row
    initial: Tensor  # [K] float64, L_i(0); 0 until the task has been seen
    ratio_steps: Tensor  # [R, N] int64, the steps at which ...
    ratios: Tensor  # [R, N] float64, ... these ratios r_i were seen
    slopes: Tensor  # [R] float64, newest alpha_i
    slope_ring: Tensor  # [K, N] float64, earlier alpha_i, for Eq. 5
    peaks: Tensor  # [H] float64, ring of a(j), for Eq. 7
    weights: Tensor  # [K] float32, newest weights

    @classmethod
    def start(cls, settings: Settings, device: torch.device) -> "State":
        tasks, rows, window = settings.num_tasks, settings.rows, settings.window

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            step=zeros(dtype=torch.int64),
            counts=zeros(rows, dtype=torch.int64),
            initial=zeros(tasks),
            ratio_steps=zeros(rows, window, dtype=torch.int64),
            ratios=zeros(rows, window),
            slopes=zeros(rows),
            slope_ring=zeros(tasks, window),
            peaks=zeros(settings.history),
            weights=torch.ones(tasks, dtype=torch.float32, device=device),
        )

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def update(settings: Settings, state: State, val_losses: Tensor, present: Tensor | None, peaks: int) -> Tensor:
    """One step in PyTorch: changes ``state`` in place, returns the weights ``[K]`` float32.

    ``peaks`` is how many entries of ``state.peaks`` to look at; those that are not filled yet are left out.
    """
    ratio_R, seen_R = _ratios(settings, state, val_losses, present)
    _fit_slopes(settings, state, ratio_R, seen_R)
    absolute_K = _absolute_logits(settings, state, seen_R[: settings.num_tasks])
    divergence = _divergence_factor(settings, state, peaks)

    alpha_K = state.slopes[: settings.num_tasks]
    relative_K = alpha_K * _scale(settings.num_tasks, alpha_K.abs().sum())
    weights_K = torch.lerp(absolute_K.softmax(0), relative_K.softmax(0), divergence)  # Eq. 6
    if settings.mftcoder:
        weights_K = (weights_K * settings.num_tasks).softmax(0)
        floor = 0.1 / settings.num_tasks
        weights_K = torch.where(weights_K.amin() < floor, 0.9 * weights_K + floor, weights_K)
    weights_K = torch.where(state.step < settings.first_weighted, 1.0, weights_K * settings.num_tasks).float()
    state.weights.copy_(weights_K)
    state.step.add_(1)
    return weights_K


def _ratios(settings: Settings, state: State, val_losses: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """r_i(t) ``[R]`` and which of them to record ``[R]``; sets L_i(0) of the tasks seen for the first time."""
    losses_K = val_losses.double()
    initial_K = torch.where(state.initial > 0, state.initial, losses_K)
    ratio_K = losses_K / initial_K
    seen_K = (initial_K > 0) & (ratio_K.abs() <= MAX_RATIO)  # false for NaN
    if present is not None:
        seen_K = seen_K & present
    if settings.mftcoder:
        seen_K = seen_K & (losses_K != 0)
    state.initial.copy_(torch.where(seen_K, initial_K, state.initial))
    if not settings.mftcoder:
        return ratio_K, seen_K
    envelope = torch.where(seen_K, ratio_K, -math.inf).amax(0, keepdim=True)
    seen_R = torch.cat((seen_K, seen_K.any(0, keepdim=True)))
    # The authors' code takes its first sample after its second update.
    return torch.cat((ratio_K, envelope)), seen_R & (state.step >= 2)


def _fit_slopes(settings: Settings, state: State, ratio_R: Tensor, seen_R: Tensor) -> None:
    """Record the ratios of this step and fit alpha_i (Eq. 2, 3)."""
    window = settings.window
    _put(state.ratio_steps, state.counts % window, state.step, seen_R)
    _put(state.ratios, state.counts % window, ratio_R, seen_R)
    state.counts.add_(seen_R)
    newest_R1 = ((state.counts - 1) % window).unsqueeze(1)
    column_N = torch.arange(window, device=state.step.device)
    kept_RN = column_N < state.counts.unsqueeze(1)
    if settings.mftcoder:
        kept_RN = kept_RN & (state.ratio_steps > state.step - window)
        x_RN = -((newest_R1 - column_N) % window)
    else:
        x_RN = state.ratio_steps - state.step
    # Least squares with both axes shifted before anything is multiplied: raw steps would cost all digits at t = 1e6.
    # Measured from the newest ratio, a constant loss has residuals and slope of exactly 0, whatever its value.
    x_RN = torch.where(kept_RN, x_RN, 0).double()
    points_R1 = kept_RN.sum(1, keepdim=True)
    x_RN = torch.where(kept_RN, x_RN - x_RN.sum(1, keepdim=True) / points_R1, 0.0)
    y_RN = state.ratios - state.ratios.gather(1, newest_R1)
    slope_R = (x_RN * y_RN).sum(1) / x_RN.square().sum(1)
    slope_R = torch.where(points_R1.squeeze(1) >= 2, slope_R, 0.0)
    state.slopes.copy_(slope_R if settings.mftcoder else torch.where(seen_R, slope_R, state.slopes))


def _absolute_logits(settings: Settings, state: State, seen_K: Tensor) -> Tensor:
    """Record the slopes of this step and return what Eq. 5 takes the softmax of, ``[K]``."""
    window = settings.window
    column_N = torch.arange(window, device=state.step.device)
    alpha_K, counts_K = state.slopes[: settings.num_tasks], state.counts[: settings.num_tasks]
    if settings.mftcoder:  # one slope per step from W on, whether the task was present or not
        age = state.step - settings.warmup
        _put(state.slope_ring, (age % window).expand_as(alpha_K), alpha_K, (age >= 0).expand_as(alpha_K))
        number = (age + 1).clamp(max=settings.slopes_kept)
        kept = (age - column_N) % window < number
    else:  # one slope per presence, beside its ratio
        _put(state.slope_ring, (counts_K - 1) % window, alpha_K, seen_K)
        number = counts_K.clamp(max=window)
        kept = column_N < number.unsqueeze(1)
    total_K = torch.where(kept, state.slope_ring.abs(), 0.0).sum(1)
    factor = torch.full_like(number, window) if settings.variant == "printed" else number
    return -alpha_K * _scale(factor, total_K)


def _divergence_factor(settings: Settings, state: State, peaks: int) -> Tensor:
    """Record a(t) and return DF(t) (Eq. 7), a float64 scalar."""
    if settings.mftcoder:
        peak = state.slopes[-1]
    else:
        peak = torch.where(state.counts >= 2, state.slopes, -math.inf).amax()
        peak = torch.where(torch.isinf(peak), 0.0, peak)  # no task has a slope yet
    age = state.step - settings.first_peak
    slot = (age.clamp(min=0) % settings.history).view(1)
    _put(state.peaks.unsqueeze(0), slot, peak, (age >= 0).view(1))
    number = (age + 1).clamp(max=settings.history)
    kept_H = torch.arange(peaks, device=peak.device) < number
    a_H = torch.where(kept_H, state.peaks[:peaks], 0.0)
    total = a_H.sum() if settings.variant == "printed" else a_H.abs().sum()
    logits_H = a_H * (-settings.temperature * _scale(number, total))
    # NaN as long as there is no peak, which is before the first weights.
    factor = number * torch.where(kept_H, logits_H, -math.inf).softmax(0).gather(0, slot)
    return factor if settings.mftcoder else factor.clamp(max=1.0)


def _put(ring_RN: Tensor, slot_R: Tensor, value: Tensor, where_R: Tensor) -> None:
    """``ring[r, slot[r]] = value[r]`` in those rows where ``where[r]``, without asking which they are."""
    slot_R1 = slot_R.unsqueeze(1)
    old_R = ring_RN.gather(1, slot_R1).squeeze(1)
    ring_RN.scatter_(1, slot_R1, torch.where(where_R, value, old_R).unsqueeze(1))


def _scale(factor: Tensor | int, total: Tensor) -> Tensor:
    """factor / total for the normalisations of Eq. 4, 5 and 7; 0, a uniform softmax, where the total is 0."""
    return torch.where(total == 0, 0.0, (factor / total).clamp(-MAX_SCALE, MAX_SCALE))
