"""CoBa written out with whole histories and exact slopes: what the balancer is compared with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Vector = NDArray[np.float64]
# Everything is float64 until the weights are rounded to float32 (6e-8 relative). The rest is room for what the
# normalisations of Eq. 4, 5 and 7 do to errors of 1e-16; tests leave out cases where those are worse than 1e9.
TOLERANCE = {"rtol": 5e-7, "atol": 5e-7}


def exact_slope(points: Sequence[tuple[int, float]]) -> float:
    """Least-squares slope in rational arithmetic: no rounding before the last conversion."""
    if len(points) < 2:
        return 0.0
    n = len(points)
    xs, ys = [Fraction(x) for x, _ in points], [Fraction(y) for _, y in points]
    covariance = n * sum(x * y for x, y in zip(xs, ys, strict=True)) - sum(xs) * sum(ys)
    return float(covariance / (n * sum(x * x for x in xs) - sum(xs) ** 2))


def softmax(logits: Sequence[float]) -> Vector:
    values = np.asarray(logits, dtype=np.float64)
    values = np.exp(values - values.max())
    return values / values.sum()


@dataclass
class Reference:
    """Feed it step by step; ``weights`` and ``slopes`` are those of the last step."""

    num_tasks: int
    window: int
    warmup: int
    temperature: float = 5.0
    variant: str = "absolute"
    history: int = 10**9

    ratios: list[list[tuple[int, float]]] = field(default_factory=list)  # per task: (step, r)
    alphas: list[list[float]] = field(default_factory=list)  # per task
    peaks: list[float] = field(default_factory=list)
    # Worst |sum| / sum of magnitudes in a denominator: at 1e-16 the formula itself has no digits left.
    conditioning: float = 1.0
    step_number: int = -1

    def __post_init__(self) -> None:
        self.ratios = [[] for _ in range(self.num_tasks)]
        self.alphas = [[] for _ in range(self.num_tasks)]
        self.initial: list[float | None] = [None] * self.num_tasks
        self.weights = np.ones(self.num_tasks)
        self.slopes = [0.0] * self.num_tasks

    def step(self, losses: Sequence[float], present: Sequence[bool]) -> Vector:
        self.step_number += 1
        seen = [self._ratio(i, float(losses[i])) if present[i] else None for i in range(self.num_tasks)]
        if self.variant == "mftcoder":
            self._record_like_mftcoder(seen)
            first, slopes_kept = self.warmup, min(max(self.window - self.warmup + 1, 1), self.window)
        else:
            self._record(seen)
            first, slopes_kept = self.warmup + 1, self.window
        if self.step_number >= first:
            self.weights = self.num_tasks * self._weigh(slopes_kept)
        return self.weights

    def _ratio(self, task: int, loss: float) -> float | None:
        if self.initial[task] is None:
            if not (loss > 0 and math.isfinite(loss)):
                return None
            self.initial[task] = loss
        if not math.isfinite(loss) or (self.variant == "mftcoder" and loss == 0):
            return None
        return loss / self.initial[task]

    def _record(self, seen: list[float | None]) -> None:
        for task, ratio in enumerate(seen):
            if ratio is not None:
                self.ratios[task].append((self.step_number, ratio))
                self.slopes[task] = exact_slope(self.ratios[task][-self.window :])
                self.alphas[task].append(self.slopes[task])
        if self.step_number >= 1:
            self.peaks.append(max((s for s, r in zip(self.slopes, self.ratios, strict=True) if len(r) > 1), default=0))

    def _record_like_mftcoder(self, seen: list[float | None]) -> None:
        if self.step_number < 2:
            return self._keep_slopes()
        for task, ratio in enumerate(seen):
            if ratio is not None:
                self.ratios[task].append((self.step_number, ratio))
        self.slopes = [self._gapless_slope(series) for series in self.ratios]
        return self._keep_slopes()

    def _keep_slopes(self) -> None:
        if self.step_number >= self.warmup:
            for task, slope in enumerate(self.slopes):
                self.alphas[task].append(slope)
            largest: dict[int, float] = {}
            for step, ratio in (pair for series in self.ratios for pair in series):
                largest[step] = max(ratio, largest.get(step, -math.inf))
            self.peaks.append(self._gapless_slope(sorted(largest.items())))

    def _gapless_slope(self, series: list[tuple[int, float]]) -> float:
        recent = [ratio for step, ratio in series if step > self.step_number - self.window]
        return exact_slope(list(enumerate(recent)))

    def _weigh(self, slopes_kept: int) -> Vector:
        relative = [
            self._over(self.num_tasks * alpha, self.slopes, signed=False)  # Eq. 4
            for alpha in self.slopes
        ]
        absolute = []
        for alpha, series in zip(self.slopes, self.alphas, strict=True):  # Eq. 5
            recent = series[-slopes_kept:]
            factor = self.window if self.variant == "printed" else len(recent)
            absolute.append(-self._over(factor * alpha, recent, signed=False))
        peaks = self.peaks[-self.history :]
        t = len(peaks)
        terms = [-self._over(self.temperature * t * a, peaks, signed=self.variant == "printed") for a in peaks]
        divergence = t * softmax(terms)[-1]  # Eq. 7
        if self.variant == "mftcoder":
            logits = divergence * softmax(relative) + (1 - divergence) * softmax(absolute)
            weights, least = softmax(self.num_tasks * logits), 1 / (10 * self.num_tasks)
            return weights * 0.9 + least if (weights < least).any() else weights
        divergence = min(divergence, 1.0)
        return divergence * softmax(relative) + (1 - divergence) * softmax(absolute)  # Eq. 6

    def _over(self, numerator: float, terms: Sequence[float], *, signed: bool) -> float:
        magnitude = sum(abs(term) for term in terms)
        total = sum(Fraction(term) for term in terms) if signed else Fraction(magnitude)
        if total == 0:
            return 0.0
        # Slopes of ratios near 1 carry errors of about 1e-16, so a denominator below that is noise.
        self.conditioning = min(self.conditioning, abs(float(total)) / max(magnitude, 1e-300), magnitude)
        return numerator / float(total)


def sequence(seed: int, steps: int, tasks: int, held: float, absent: float) -> tuple[Tensor, Tensor]:
    """Losses ``[steps, tasks]`` float32, where some stay what they were, and who is present."""
    rng = np.random.default_rng(seed)
    losses = rng.uniform(0.1, 3.0, (steps, tasks)).astype(np.float32)
    for t in range(1, steps):
        losses[t] = np.where(rng.random(tasks) < held, losses[t - 1], losses[t])
    return torch.from_numpy(losses), torch.from_numpy(rng.random((steps, tasks)) >= absent)
