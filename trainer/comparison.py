"""Delta I% and Delta E%: how methods compare with single-task baselines (paper, Eq. 12-14).

Input is the table ``RESULTS.json``::

    {"tasks":    {"VQAv2": {"test-dev EM": "higher"}},
     "baseline": {"VQAv2": {"test-dev EM": 77.73}},
     "methods":  {"EW": {"VQAv2": {"test-dev EM": 78.27}}}}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from trainer.errors import UserError, nearest
from trainer.parsing import number


@dataclass(frozen=True)
class Comparison:
    """All in percent; ``delta_e`` without its minus sign, as the paper's tables print it."""

    delta_i: float
    delta_e: float
    per_task: dict[str, float]


def task_improvement(
    method: Mapping[str, float], baseline: Mapping[str, float], directions: Mapping[str, str]
) -> float:
    """I_i of Eq. 12: mean over a task's metrics of the relative change, negated where lower is better."""
    changes = [
        (1 if direction == "higher" else -1) * (method[metric] - baseline[metric]) / baseline[metric]
        for metric, direction in directions.items()
    ]
    return math.fsum(changes) / len(changes)


def compare(results: Mapping[str, Any]) -> dict[str, Comparison | None]:
    """Eq. 12-14 for every method of a results table; other top-level keys are ignored.

    Returns:
        None for a method with a score that is null: a perplexity that is infinite has no relative change.

    Raises:
        UserError: naming the place of a missing, unknown or non-finite entry, an unknown direction, or a
            baseline that is not positive (Eq. 12 divides by it).
    """
    if not isinstance(results, Mapping):
        raise UserError(f"results must be an object with 'tasks', 'baseline' and 'methods', got {results!r}")
    for key in ("tasks", "baseline", "methods"):
        if not isinstance(results.get(key), Mapping):
            raise UserError(f"results: {key!r} must be an object, got {results.get(key)!r}")
    tasks = _directions(results["tasks"])
    baseline = _values("baseline", results["baseline"], tasks)
    for task, metrics in baseline.items():
        for metric, value in metrics.items():
            if value <= 0:
                raise UserError(
                    f"baseline[{task!r}][{metric!r}] is {value:g}: Eq. 12 divides by the baseline, which "
                    "must be positive; leave this metric out or train a baseline that learns it"
                )
    comparisons: dict[str, Comparison | None] = {}
    for name, table in results["methods"].items():
        if _has_null(table):
            comparisons[name] = None
            continue
        values = _values(f"methods[{name!r}]", table, tasks)
        improvements = {
            task: task_improvement(values[task], baseline[task], directions) for task, directions in tasks.items()
        }
        n = len(improvements)
        comparisons[name] = Comparison(
            delta_i=100 * math.fsum(improvements.values()) / n,  # Eq. 13
            delta_e=100 * math.fsum(max(0.0, -i) for i in improvements.values()) / n,  # Eq. 14, sign dropped
            per_task={task: 100 * improvement for task, improvement in improvements.items()},
        )
    return comparisons


def mean_comparison(each: Sequence[Comparison]) -> Comparison:
    """The means over seeds. Delta E of mean scores would be smaller: gains of one seed would hide losses of another."""
    return Comparison(
        delta_i=fmean(one.delta_i for one in each),
        delta_e=fmean(one.delta_e for one in each),
        per_task={task: fmean(one.per_task[task] for one in each) for task in each[0].per_task},
    )


def compare_to_json(results: Mapping[str, Any]) -> dict[str, dict[str, Any] | None]:
    """What ``cotbal compare`` prints: {method: {"delta_i", "delta_e", "per_task"}}, null where there is none."""
    return {name: asdict(found) if found else None for name, found in compare(results).items()}


def _has_null(table: Any) -> bool:
    tasks = table.values() if isinstance(table, Mapping) else ()
    return any(None in metrics.values() for metrics in tasks if isinstance(metrics, Mapping))


def _directions(tasks: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    if not tasks:
        raise UserError("results: 'tasks' is empty; name at least one task with its metrics")
    for task, metrics in tasks.items():
        if not isinstance(metrics, Mapping) or not metrics:
            raise UserError(f"tasks[{task!r}] must map metric names to 'higher' or 'lower', got {metrics!r}")
        for metric, direction in metrics.items():
            if direction not in ("higher", "lower"):
                raise UserError(f"tasks[{task!r}][{metric!r}] must be 'higher' or 'lower', got {direction!r}")
    return {task: dict(metrics) for task, metrics in tasks.items()}


def _values(where: str, table: Any, tasks: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, float]]:
    """The part of ``table`` that ``tasks`` asks for, complete and finite."""
    _check_names(where, table, tasks, "task")
    values: dict[str, dict[str, float]] = {}
    for task, metrics in tasks.items():
        _check_names(f"{where}[{task!r}]", table[task], metrics, "metric")
        values[task] = {}
        for metric in metrics:
            value = number(table[task][metric])
            if value is None:
                given = "null" if table[task][metric] is None else repr(table[task][metric])
                raise UserError(f"{where}[{task!r}][{metric!r}] must be a finite number, got {given}")
            values[task][metric] = value
    return values


def _check_names(where: str, table: Any, expected: Iterable[str], kind: str) -> None:
    if not isinstance(table, Mapping):
        raise UserError(f"{where} must be an object with one entry per {kind}, got {table!r}")
    for name in expected:
        if name not in table:
            raise UserError(f"{where} has no {kind} {name!r}{nearest(name, table)}")
    for name in table:
        if name not in expected:
            raise UserError(f"{where} has {kind} {name!r}, which 'tasks' does not list")
