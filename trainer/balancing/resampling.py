"""How much of CoTBal's weights is the luck of the validation samples: Eq. 3-11 of resampled validation sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.balancing.cotbal import cotbal_weights
from trainer.balancing.scores import Scores

Array = NDArray[np.float64]
DRAWS = 400  # a standard deviation is known to 4 %


@dataclass(frozen=True)
class Influences:
    """What each of a task's n validation samples does to its scores (:class:`trainer.metrics.MetricResult`).

    Attributes:
        mini, full: of V_j(mini), [n], and of V_j(i+mini) for every i, [N, n].
        alone: of the models with the mini and with all data of task j alone, [2, n]; None without a precise difficulty.
    """

    mini: Array
    full: Array
    alone: Array | None = None


def resampled(
    scores: Scores, influences: list[Influences], strategy: str = "cotbal", seed: int = 0, **options: Any
) -> dict[str, Any]:
    """Standard deviations of C, D and the weights over resampled validation sets.

    All models are scored on the same samples of a task, so they are resampled together. Degenerate scores are bounded
    in every draw, whatever is done about those of the run itself. Trainings with another seed are not in it.

    Args:
        influences: in the order of ``scores.tasks``.
        strategy: of the weights.
        options: of :func:`trainer.balancing.cotbal.cotbal_weights`, without ``on_degenerate``.

    Returns:
        ``contribution``, an N x N list; ``difficulty`` and ``applied``, lists of N, as in ``weights.json``. Nothing
        where a task has a single sample.
    """
    if any(len(own.mini) == 1 for own in influences):
        return {}
    generator = np.random.default_rng(seed)
    found = [
        cotbal_weights(_draw(scores, influences, generator), on_degenerate="clip", **options) for _ in range(DRAWS)
    ]
    drawn: dict[str, list[Any]] = {
        "contribution": [one.contribution for one in found],
        "difficulty": [one.difficulty for one in found],
        "applied": [list(one.by_strategy(strategy).values()) for one in found],
    }
    return {key: np.std(values, axis=0, ddof=1).tolist() for key, values in drawn.items()}


def _draw(scores: Scores, influences: list[Influences], generator: np.random.Generator) -> Scores:
    """The scores on a resampled validation set of every task."""
    mini, full = scores.mini.copy(), scores.full.copy()
    alone = None
    if scores.alone_mini is not None and scores.alone_full is not None:
        alone = np.stack([scores.alone_mini, scores.alone_full])
    for j, own in enumerate(influences):
        n = len(own.mini)
        chosen = generator.integers(n, size=n)
        mini[j] += own.mini[chosen].mean()
        full[:, j] += own.full[:, chosen].mean(axis=1)
        if alone is not None and own.alone is not None:
            alone[:, j] += own.alone[:, chosen].mean(axis=1)
    return Scores(scores.tasks, mini, full, scores.higher_is_better, *([] if alone is None else alone))
