"""Standard errors of Delta I% over the test samples, by the delta method for Eq. 12 and 13.

Every score has a vector whose length is its standard error: what each image contributes, which is the sum of what its
samples do (:class:`trainer.metrics.MetricResult`), and in a place of its own the error of a score whose samples are all
alike. Eq. 12 and 13 add up scores, so by the chain rule they add up vectors, the baseline's included, and the error of
I_i, of Delta I or of a difference is the length of what comes out. An image that several questions, test sets, metrics
or tasks share has one place, and so it has for all methods: a question which is hard for two of them is no noise of
their difference. Images count as independent, and samples without one. Other seeds are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.comparison import compare
from trainer.errors import UserError
from trainer.files import known

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sampled:
    """What is known of a score's samples.

    Attributes:
        influences: of each on the score, [n]; means over seeds.
        unseen: the error of a score whose samples are all alike, else 0.
    """

    influences: Array
    unseen: float = 0.0


Samples = Mapping[str, Mapping[str, Mapping[str, Sampled]]]  # task -> test set -> score
Images = Mapping[str, Mapping[str, NDArray[np.int64]]]  # task -> test set -> the number of each sample's image, [n]


def sampling_errors(
    results: Mapping[str, Any], samples: Mapping[str, Samples], baseline: Samples, images: Images, final: str
) -> dict[str, Any]:
    """Standard errors in percent, ``{method: {"delta_i", "per_task", "behind_final"}}``.

    ``behind_final`` is of the difference in Delta I between the method `final` and this one. An error is None where a
    test set has a single image. Methods with an infinite score are left out; without a usable baseline all are.

    Args:
        results: a table of results, see :mod:`trainer.comparison`.
        samples: of every method.
        baseline: those of the baseline.
        images: the same numbers in all test sets that have the same images, from 0 on; a sample without an image has a
            number of its own.
    """
    try:
        comparisons = compare(results)
    except UserError:  # said where Delta I itself is asked for
        return {}
    names = [(task, name) for task, directions in results["tasks"].items() for name in directions]
    count = 1 + max(int(own.max()) for sets in images.values() for own in sets.values())
    length = count + (1 + len(samples)) * len(names)

    def vectors(table: Samples, number: int) -> dict[tuple[str, str], Array]:
        """Of every score by task and name; the methods are numbered from 1 on, and 0 is the baseline."""
        found: dict[tuple[str, str], Array] = {}
        for task, sets in table.items():
            for part, scores in sets.items():
                places = images[task][part]
                groups = len(np.unique(places))
                scale = math.sqrt(groups / (groups - 1)) / len(places) if groups > 1 else math.nan
                for name, own in scores.items():
                    vector = scale * np.bincount(places, own.influences, minlength=length).astype(np.float64)
                    vector[count + number * len(names) + names.index((task, name))] = own.unseen
                    found[task, name] = vector
        return found

    base = vectors(baseline, 0)
    found: dict[str, Any] = {}
    moved = {}
    for number, (method, table) in enumerate(results["methods"].items(), 1):
        if comparisons[method] is not None:
            per_task = _improvements(results, table, vectors(samples[method], number), base)
            moved[method] = sum(per_task.values(), np.zeros(length)) / len(per_task)  # Eq. 13
            found[method] = {"delta_i": _error(moved[method])}
            found[method]["per_task"] = {task: _error(vector) for task, vector in per_task.items()}
    for method in found:
        if final in moved and method != final:
            found[method]["behind_final"] = _error(moved[final] - moved[method])
    return found


def _improvements(
    results: Mapping[str, Any],
    method: Mapping[str, Any],
    own: Mapping[tuple[str, str], Array],
    base: Mapping[tuple[str, str], Array],
) -> dict[str, Array]:
    """The vector of every I_i of Eq. 12."""
    found = {}
    for task, directions in results["tasks"].items():
        each = []
        for score, direction in directions.items():
            sign = 1 if direction == "higher" else -1
            M_e, M_b = method[task][score], results["baseline"][task][score]
            each.append(sign * (own[task, score] / M_b - M_e / M_b**2 * base[task, score]))
        found[task] = np.mean(each, axis=0)
    return found


def _error(vector: Array) -> float | None:
    """In percent."""
    return known(100 * float(np.linalg.norm(vector)))
