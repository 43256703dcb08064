"""CoTBal's task weights from validation scores: Eq. 3-11 of the paper.

Shapes: N tasks; ``V_mini[j]`` is V_j(mini), ``V_full[i, j]`` is V_j(i+mini), the score on task j of the
model trained on all data of task i and on mini subsets of the others. The functions up to
`cotbal_lambda` are the equations and nothing else; `cotbal_weights` checks its input, applies them and says
what it had to change.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.balancing.scores import Scores
from trainer.errors import UserError, unknown_name

Array = NDArray[np.float64]

STRATEGIES = ("cotbal", "one2all", "all2one", "contribution", "difficulty")

# Under the "clip" policy; under "error" what is outside is kept and reported as a warning.
# 1 is what a task's own data brings, so 2 already is a task that helps twice as much as that.
CONTRIBUTION_RANGE = (-2.0, 2.0)
DIFFICULTY_RANGE = (0.0, 1.0)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def contributions(V_mini: Array, V_full: Array) -> Array:
    """Eq. 3: C_ij = (V_j(i+mini) - V_j(mini)) / (V_j(j+mini) - V_j(mini)); C_jj = 1.

    The ratio is the same for a metric and its negative, so lower-is-better metrics need no special case.
    """
    return (V_full - V_mini[None, :]) / (np.diag(V_full) - V_mini)[None, :]


def one2all(C: Array) -> Array:
    """Eq. 4: C_one2all,i = 1/(N-1) sum_{j != i} C_ij; 0 for a single task, which has no others."""
    N = len(C)
    others = np.where(np.eye(N, dtype=bool), 0.0, C)
    return others.sum(axis=1) / max(N - 1, 1)


def all2one(C: Array) -> Array:
    """Eq. 6: C_all2one,i = 1/(N-1) sum_{j != i} C_ji."""
    return one2all(C.T)


def one2all_lambda(C: Array, T: float) -> Array:
    """Eq. 5: lambda_one2all = N softmax(C_one2all / T)."""
    return len(C) * softmax(one2all(C) / T)


def all2one_lambda(C: Array, T: float) -> Array:
    """Eq. 7: lambda_all2one = N softmax(-C_all2one / T)."""
    return len(C) * softmax(-all2one(C) / T)


def contribution_lambda(lambda_one2all: Array, lambda_all2one: Array) -> Array:
    """Eq. 8: lambda_C = (lambda_one2all + lambda_all2one) / 2."""
    return (lambda_one2all + lambda_all2one) / 2


def difficulties(V_mini: Array, V_own: Array, higher_is_better: NDArray[np.bool_]) -> Array:
    """Eq. 9: D_i = 1 - V_i(mini) / V_i(i+mini), where ``V_own[i]`` is V_i(i+mini).

    Where lower is better, Eq. 9 is applied to the reciprocal 1/V, which is higher-is-better:
    D_i = 1 - V_i(i+mini) / V_i(mini), the share of the mini model's error that the full data removes. Both
    are 0 when the mini subset is enough and approach 1 when it teaches next to nothing.
    """
    worse, better = np.where(higher_is_better, (V_mini, V_own), (V_own, V_mini))
    return 1 - worse / better


def difficulty_lambda(D: Array, T: float) -> Array:
    """Eq. 10: lambda_D = N softmax(D / T)."""
    return len(D) * softmax(D / T)


def cotbal_lambda(lambda_C: Array, lambda_D: Array, alpha: float) -> Array:
    """Eq. 11: lambda_CoTBal = alpha lambda_C + (1 - alpha) lambda_D."""
    return alpha * lambda_C + (1 - alpha) * lambda_D


class DegenerateScoresError(UserError):
    """A task's own data hardly improves it; how to have the values bounded is the caller's to add."""


@dataclass(frozen=True)
class Clipped:
    """One entry that the "clip" policy changed; ``original`` is None where the equation divides by zero."""

    quantity: str
    tasks: tuple[str, ...]
    original: float | None
    value: float


@dataclass(frozen=True)
class CotbalWeights:
    """Everything between the score table and the weights; vectors are ordered like ``tasks``."""

    tasks: tuple[str, ...]
    temperature: float
    alpha: float
    contribution: Array
    difficulty: Array
    lambda_one2all: Array
    lambda_all2one: Array
    lambda_c: Array
    lambda_d: Array
    weights: Array
    clipped: list[Clipped] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def by_strategy(self, strategy: str = "cotbal") -> dict[str, float]:
        """Weight of each task under one of `STRATEGIES` (the paper's Table 3 ablates them)."""
        vectors = (self.weights, self.lambda_one2all, self.lambda_all2one, self.lambda_c, self.lambda_d)
        if strategy not in STRATEGIES:
            raise unknown_name("strategy", strategy, STRATEGIES)
        return dict(zip(self.tasks, vectors[STRATEGIES.index(strategy)].tolist(), strict=True))

    def to_json(self) -> dict[str, Any]:
        """What ``cotbal weights`` prints: N x N lists and lists of N in the order of ``tasks``."""
        return {
            "tasks": list(self.tasks),
            "temperature": self.temperature,
            "alpha": self.alpha,
            "contribution": self.contribution.tolist(),
            "difficulty": self.difficulty.tolist(),
            "lambda_one2all": self.lambda_one2all.tolist(),
            "lambda_all2one": self.lambda_all2one.tolist(),
            "lambda_c": self.lambda_c.tolist(),
            "lambda_d": self.lambda_d.tolist(),
            "weights": self.weights.tolist(),
            "clipped": [{**asdict(entry), "tasks": list(entry.tasks)} for entry in self.clipped],
            "warnings": self.warnings,
        }


def cotbal_weights(
    scores: Scores,
    temperature: float = 0.5,
    alpha: float = 0.5,
    on_degenerate: str = "error",
    minimum_gain: float = 0.01,
    contribution_range: tuple[float, float] = CONTRIBUTION_RANGE,
    difficulty: str = "reused",
) -> CotbalWeights:
    """Weights of Eq. 11, with every intermediate quantity.

    A task j is degenerate when its own data hardly improves it: gain_j = V_j(j+mini) - V_j(mini), signed so
    that positive is better, is at most ``minimum_gain`` times the larger of the two scores. Eq. 3 divides by
    it and would be noise. Eq. 9 is undefined when its denominator is not positive.

    Args:
        temperature: T of Eq. 5, 7 and 10, positive.
        alpha: alpha of Eq. 11, within [0, 1].
        on_degenerate: "error" raises :class:`DegenerateScoresError`, naming the tasks. "clip" uses the smallest
            admissible gain in place of gain_j (contributions of 0 where that is 0), clips every contribution to
            ``contribution_range`` and every difficulty to [0, 1] (0 where Eq. 9 is undefined), and lists each
            changed entry in ``clipped``.
        minimum_gain: relative to the score, so that it means the same for percentages and fractions.
        difficulty: "reused": Eq. 9 as printed, from the models of the contributions. "precise": from the models of one
            task alone, V_i(mini of i) and V_i(i) (section 3.3, Table 3).
    """
    _check_options(temperature, alpha, on_degenerate, minimum_gain, contribution_range)
    V_mini, V_full = scores.mini, scores.full
    V_own = np.diag(V_full)
    V_easy, V_hard = _compared(scores, difficulty)  # of Eq. 9
    sign = np.where(scores.higher_is_better, 1.0, -1.0)
    gain = sign * (V_own - V_mini)
    smallest = minimum_gain * np.maximum(np.abs(V_own), np.abs(V_mini))
    divisor = np.where(scores.higher_is_better, V_hard, V_easy)  # of Eq. 9
    flat, undefined = gain <= smallest, divisor <= 0
    clipped: list[Clipped] = []
    warnings: list[str] = []

    if flat.any() or undefined.any():
        problems = _describe(scores, flat, undefined, divisor, difficulty, minimum_gain)
        if on_degenerate == "error":
            raise DegenerateScoresError(
                "; ".join(problems) + ". Train the proxies longer, validate on more samples, make the task auxiliary, "
                "or have the values bounded"
            )
        warnings += problems

    if on_degenerate == "error":
        C = contributions(V_mini, V_full)
        D = difficulties(V_easy, V_hard, scores.higher_is_better)
        low, high = contribution_range
        warnings += [
            f"the contribution of {scores.tasks[i]!r} to {scores.tasks[j]!r} is {C[i, j]:.3g}, outside "
            f"[{low:g}, {high:g}]: it dominates the weights; 'clip' would bound it"
            for i, j in np.argwhere(np.clip(C, low, high) != C)
        ]
        warnings += [
            f"the difficulty of {task!r} is {value:.3g}, outside [0, 1], from V = {little:.6g} with little data and "
            f"{much:.6g} with all: it dominates the weights; 'clip' would bound it"
            for task, value, little, much in zip(scores.tasks, D, V_easy, V_hard, strict=True)
            if value != np.clip(value, *DIFFICULTY_RANGE)
        ]
    else:
        C = _clipped_contributions(scores, flat, smallest, contribution_range, clipped)
        D = _clipped_difficulties(scores, V_easy, V_hard, undefined, clipped)

    lambda_one2all = one2all_lambda(C, temperature)
    lambda_all2one = all2one_lambda(C, temperature)
    lambda_c = contribution_lambda(lambda_one2all, lambda_all2one)
    lambda_d = difficulty_lambda(D, temperature)
    weights = cotbal_lambda(lambda_c, lambda_d, alpha)
    if not np.isfinite(weights).all():
        raise UserError(f"the weights of {list(scores.tasks)} come out as {weights.tolist()}: the scores overflow")
    return CotbalWeights(
        scores.tasks, temperature, alpha, C, D, lambda_one2all, lambda_all2one, lambda_c, lambda_d, weights,
        clipped, warnings,
    )  # fmt: skip


def _clipped_contributions(
    scores: Scores,
    flat: NDArray[np.bool_],
    smallest: Array,
    bounds: tuple[float, float],
    clipped: list[Clipped],
) -> Array:
    tasks, N = scores.tasks, len(scores.tasks)
    sign = np.where(scores.higher_is_better, 1.0, -1.0)
    gain = sign * (scores.full - scores.mini[None, :])  # gain[i, j]: what the data of i brings to j
    own = np.diag(gain)
    # A task whose scores are all 0 has no scale at all: nothing was contributed to it.
    divisor = np.where(flat, np.where(smallest > 0, smallest, np.inf), own)
    C = np.clip(gain / divisor[None, :], *bounds)
    np.fill_diagonal(C, 1.0)
    for i in range(N):
        for j in range(N):
            original = gain[i, j] / own[j] if own[j] != 0 else None
            if i != j and (original is None or original != C[i, j]):
                clipped.append(Clipped("contribution", (tasks[i], tasks[j]), _number(original), float(C[i, j])))
    return C


def _compared(scores: Scores, difficulty: str) -> tuple[Array, Array]:
    """Scores of the model with little data of each task and of the one with all of it."""
    if difficulty == "reused":
        return scores.mini, np.diag(scores.full)
    if difficulty != "precise":
        raise UserError(f"difficulty must be 'reused' or 'precise', got {difficulty!r}")
    if scores.alone_mini is None or scores.alone_full is None:
        raise UserError(
            "the precise difficulty needs scores['alone'] = {'mini': {task: V}, 'full': {task: V}}, of models trained "
            "on one task alone; use the 'reused' one without them"
        )
    return scores.alone_mini, scores.alone_full


def _clipped_difficulties(
    scores: Scores, V_easy: Array, V_hard: Array, undefined: NDArray[np.bool_], clipped: list[Clipped]
) -> Array:
    D = np.zeros(len(scores.tasks))
    defined = ~undefined
    exact = difficulties(V_easy[defined], V_hard[defined], scores.higher_is_better[defined])
    D[defined] = np.clip(exact, *DIFFICULTY_RANGE)
    originals: list[float | None] = [None] * len(D)
    for index, value in zip(np.flatnonzero(defined), exact, strict=True):
        originals[index] = float(value)
    for task, original, value in zip(scores.tasks, originals, D.tolist(), strict=True):
        if original != value:
            clipped.append(Clipped("difficulty", (task,), original, value))
    return D


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _describe(
    scores: Scores,
    flat: NDArray[np.bool_],
    undefined: NDArray[np.bool_],
    divisor: Array,
    difficulty: str,
    minimum_gain: float,
) -> list[str]:
    problems = []
    for j, task in enumerate(scores.tasks):
        own, mini = scores.full[j, j], scores.mini[j]
        if flat[j]:
            wanted = "exceed" if scores.higher_is_better[j] else "fall below"
            problems.append(
                f"task {task!r}: V({task}+mini) = {own:.6g} does not {wanted} V(mini) = {mini:.6g} by "
                f"more than {100 * minimum_gain:g} % of the score, so Eq. 3 is undefined in column {task!r}"
            )
        if undefined[j]:
            large, small = (f"{task}+mini", "mini") if difficulty == "reused" else (f"{task} alone", f"mini of {task}")
            name = large if scores.higher_is_better[j] else small
            problems.append(
                f"task {task!r}: V({name}) = {divisor[j]:.6g} is not positive, so the difficulty of {task!r} "
                "(Eq. 9) is undefined"
            )
    return problems


def _check_options(
    temperature: float, alpha: float, on_degenerate: str, minimum_gain: float, bounds: tuple[float, float]
) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise UserError(f"temperature must be a positive number, got {temperature!r}")
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha must be within [0, 1], got {alpha!r}")
    if on_degenerate not in ("error", "clip"):
        raise UserError(f"on_degenerate must be 'error' or 'clip', got {on_degenerate!r}")
    if not (math.isfinite(minimum_gain) and minimum_gain >= 0):
        raise UserError(f"minimum_gain must be a number >= 0, got {minimum_gain!r}")
    if not bounds[0] <= 0 < 1 <= bounds[1]:
        raise UserError(f"contribution_range must contain 0 and 1, got {bounds!r}")
