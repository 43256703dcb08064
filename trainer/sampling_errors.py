"""Standard errors of Delta I% over the test samples, by the delta method for Eq. 12 and 13.

The influence of a sample on a score (:class:`trainer.metrics.MetricResult`) becomes one on I_i and on Delta I by the
chain rule, the baseline's part included. Scores of a task that share a test set share its samples, and so do methods:
their influences are added and subtracted sample by sample, so that a question which is hard for both methods is no
noise of their difference. Samples count as independent, and so do test sets. Other seeds are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.comparison import compare
from trainer.errors import UserError

Array = NDArray[np.float64]
Samples = Mapping[str, Mapping[str, Mapping[str, Array]]]  # task -> test set -> score -> influence of each sample, [n]


def sampling_errors(
    results: Mapping[str, Any], samples: Mapping[str, Samples], baseline: Samples, final: str
) -> dict[str, Any]:
    """Standard errors in percent, ``{method: {"delta_i", "per_task", "behind_final"}}``.

    ``behind_final`` is of the difference in Delta I between the method `final` and this one. An error is None where a
    test set has a single sample. Methods with an infinite score are left out; without a usable baseline all are.

    Args:
        results: a table of results, see :mod:`trainer.comparison`.
        samples: of every method.
        baseline: those of the baseline.
    """
    try:
        comparisons = compare(results)
    except UserError:  # said where Delta I itself is asked for
        return {}
    moved = {
        method: _improvement_influences(results, table, samples[method], baseline)
        for method, table in results["methods"].items()
        if comparisons[method] is not None
    }
    tasks = len(results["tasks"])
    found: dict[str, Any] = {}
    for method, own in moved.items():
        per_task = {task: _error(x for (name, _), x in own.items() if name == task) for task in results["tasks"]}
        found[method] = {"delta_i": _error(x / tasks for x in own.values()), "per_task": per_task}
        if final in moved and method != final:
            apart = (moved[final][key] - x for key, x in own.items())
            found[method]["behind_final"] = _error(x / tasks for x in apart)
    return found


def _improvement_influences(
    results: Mapping[str, Any], method: Mapping[str, Any], own: Samples, base: Samples
) -> dict[tuple[str, str], Array]:
    """The influence of every sample on I_i of Eq. 12, by task and test set."""
    found = {}
    for task, directions in results["tasks"].items():
        for part, scores in own[task].items():
            each = []
            for score, influence in scores.items():
                sign = 1 if directions[score] == "higher" else -1
                M_e, M_b = method[task][score], results["baseline"][task][score]
                each.append(sign * (influence / M_b - M_e / M_b**2 * base[task][part][score]))
            found[task, part] = np.sum(each, axis=0) / len(directions)
    return found


def _error(sets: Iterable[Array]) -> float | None:
    """Of a sum over independent test sets, in percent."""
    variance = 0.0
    for influences in sets:
        n = len(influences)
        if n == 1:
            return None
        variance += float(influences @ influences) / (n - 1) / n
    return 100 * math.sqrt(variance)
