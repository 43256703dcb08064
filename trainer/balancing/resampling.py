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
    """What a task's n validation samples do to its scores (:class:`trainer.metrics.MetricResult`).

    The M models are the mini one, i+mini for every i and, for the precise difficulty, those with the mini and with all
    data of the task alone.

    Attributes:
        samples: of each sample on each model's score, [M, n].
        unseen: the error of a score whose samples are all alike, else 0, [M].
    """

    samples: Array
    unseen: Array


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
    if any(own.samples.shape[1] == 1 for own in influences):
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
    """The scores on a resampled validation set of every task.

    Samples that are all alike stay so in every draw; there the score is drawn from the ends of Wilson's interval, which
    is twice its error wide and begins where it is.
    """
    rows = [scores.mini[None], scores.full]
    if scores.alone_mini is not None and scores.alone_full is not None:
        rows += [scores.alone_mini[None], scores.alone_full[None]]
    V = np.concatenate(rows)
    for j, own in enumerate(influences):
        models, n = own.samples.shape
        inwards = np.where(V[:, j] == 0, 1.0, -1.0)
        V[:, j] += own.samples[:, generator.integers(n, size=n)].mean(axis=1)
        V[:, j] += inwards * own.unseen * 2 * generator.integers(2, size=models)
    return Scores(scores.tasks, V[0], V[1 : len(V[0]) + 1], scores.higher_is_better, *V[len(V[0]) + 1 :])
