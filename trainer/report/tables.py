"""Numbers of the report: test scores with their standard errors and baselines, Delta I and Delta E, headlines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from trainer.balancing.registry import training_label
from trainer.comparison import Comparison, compare, mean_comparison
from trainer.errors import UserError, listed
from trainer.evaluation.scoring import scores_by_task
from trainer.metrics import METRICS, Cider, Perplexity
from trainer.parsing import number
from trainer.report.run_directory import RunDirectory

PERCENT = {metric.label for metric in METRICS.values() if not isinstance(metric, (Cider, Perplexity))}
BASELINES = {"majority": "majority answer", "question_only": "question only"}
FINAL, EQUAL, SINGLE = "CoTBal", "EW", "STL"


def metric_label(metric: Any) -> str:
    """ "EM" for "exact_match"; a label stays what it is."""
    return METRICS[metric].label if metric in METRICS else str(metric)


def set_and_metric(score: str) -> tuple[str, str]:
    """The test set's name, empty where there is none, and the metric's label in the name of a score."""
    for metric in METRICS.values():
        if score.endswith(f" {metric.label}"):
            return score.removesuffix(f" {metric.label}"), metric.label
    return "", score


def format_value(value: float | None, score: str) -> str:
    """Percentages with one decimal, CIDEr with three, anything else with four digits."""
    if value is None:
        return "–"
    _, label = set_and_metric(score)
    if label.startswith("CIDEr"):
        return f"{value:.3f}"
    return f"{value:.1f}" if label in PERCENT else f"{value:.4g}"


@dataclass
class ScoreTable:
    """Scores of every column by (task, score); columns are the baselines, STL and the methods, in that order.

    ``errors`` are of the test sampling, ``spreads`` standard deviations over seeds, where there are several.
    """

    directions: dict[tuple[str, str], str] = field(default_factory=dict)
    values: dict[str, dict[tuple[str, str], float]] = field(default_factory=dict)
    errors: dict[str, dict[tuple[str, str], float]] = field(default_factory=dict)
    spreads: dict[str, dict[tuple[str, str], float]] = field(default_factory=dict)
    complete: bool = False

    @property
    def methods(self) -> list[str]:
        return [name for name in self.values if name not in BASELINES]

    @property
    def final(self) -> str | None:
        """The model the report is about: CoTBal's, or the last one there is."""
        methods = self.methods
        return FINAL if FINAL in methods else methods[-1] if methods else None

    def advantage(self, method: str, over: str, key: tuple[str, str]) -> float | None:
        """How much better ``method`` is than ``over``, in units of its own standard error; None if unknown."""
        value, floor = self.values[method].get(key), self.values.get(over, {}).get(key)
        error = self.errors.get(method, {}).get(key)
        if value is None or floor is None or error is None:
            return None
        gap = (value - floor) * (1 if self.directions[key] == "higher" else -1)
        return gap / error if error > 0 else math.copysign(math.inf, gap) if gap else 0.0


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(row, Mapping) for row in value.values())


def _flat(table: Any) -> dict[tuple[str, str], float]:
    if not isinstance(table, Mapping):
        return {}
    return {
        (task, metric): value
        for task, metrics in table.items()
        if isinstance(metrics, Mapping)
        for metric, raw in metrics.items()
        if (value := number(raw)) is not None
    }


def read_scores(run: RunDirectory) -> ScoreTable:
    """From ``results.json``, or from the test evaluations that exist so far."""
    results = run.results
    if results is None or not _is_table(results.get("tasks")):
        if results is not None:
            run.damaged.append("results.json: 'tasks' must map tasks to metrics and their directions")
        return _scores_so_far(run)
    methods = {name: table for name, table in (results.get("methods") or {}).items() if name != FINAL}
    ordered = {
        **{name: (results.get("baselines") or {}).get(name) for name in BASELINES},
        SINGLE: results.get("baseline"),
        **methods,
        FINAL: (results.get("methods") or {}).get(FINAL),
    }
    errors = results.get("standard_errors") or {}
    return ScoreTable(
        directions={
            (task, metric): direction
            for task, metrics in results["tasks"].items()
            for metric, direction in metrics.items()
        },
        values={name: flat for name, table in ordered.items() if (flat := _flat(table))},
        errors={name: _flat(table) for name, table in errors.items()},
        spreads=_over_seeds(run),
        complete=True,
    )


def scores_by_seed(run: RunDirectory) -> dict[str, list[Any]]:
    """``seeds`` of ``results.json``: a method's table for every seed; empty when there is one seed."""
    by_method = (run.results or {}).get("seeds")
    if not isinstance(by_method, Mapping):
        return {}
    return {method: tables for method, tables in by_method.items() if isinstance(tables, list)}


def _over_seeds(run: RunDirectory) -> dict[str, dict[tuple[str, str], float]]:
    """The standard deviation over seeds of every score that all of them have: a perplexity may be infinite, null."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for method, tables in scores_by_seed(run).items():
        rows = [_flat(table) for table in tables]
        for key in rows[0] if rows else ():
            deviation = spread([row[key] for row in rows]) if all(key in row for row in rows) else None
            if deviation is not None:
                found.setdefault(method, {})[key] = deviation
    return found


def _scores_so_far(run: RunDirectory) -> ScoreTable:
    scores = ScoreTable()
    root = run.path / "evaluations"
    names = sorted(file.parent.parent.name for file in root.glob("*/test/metrics.json") if "@" not in str(file))
    names.sort(key=lambda name: (not name.startswith("stl-"), name == "cotbal"))
    for name in names:
        method = training_label(name)
        by_task = scores_by_task(run.metrics(name, "test"))
        for task, score, entry in ((task, *item) for task, own in by_task.items() for item in own.items()):
            label = metric_label(score)
            _, metric = set_and_metric(label)
            better = next((m.higher_is_better for m in METRICS.values() if m.label == metric), True)
            value, error = number(entry.get("value")), number(entry.get("standard_error"))
            if value is None:
                continue
            scores.directions[task, label] = "higher" if better else "lower"
            scores.values.setdefault(method, {})[task, label] = value
            if error is not None:
                scores.errors.setdefault(method, {})[task, label] = error
    return scores


def score_rows(scores: ScoreTable, samples: Mapping[tuple[str, str], Any]) -> list[dict[str, Any]]:
    """One row per task, test set and metric; a trained model within two standard errors of the majority is "at chance".

    Args:
        samples: records by task and test set.
    """
    rows = []
    for key in scores.directions:
        task, label = key
        cells = []
        best = _best(scores, key)
        for name in scores.values:
            value, error = scores.values[name].get(key), scores.errors.get(name, {}).get(key)
            deviation = scores.spreads.get(name, {}).get(key)
            advantage = scores.advantage(name, "majority", key) if name in scores.methods else None
            cells.append(
                {
                    "column": name,
                    "value": format_value(value, label),
                    "error": format_value(error, label) if error is not None else None,
                    "spread": format_value(deviation, label) if deviation is not None else None,
                    "best": value is not None and name in scores.methods and value == best,
                    "at_chance": advantage is not None and advantage <= 2,
                }
            )
        part, _ = set_and_metric(label)
        rows.append({"task": task, "metric": label, "samples": samples.get((task, part)), "cells": cells})
    return rows


def _best(scores: ScoreTable, key: tuple[str, str]) -> float | None:
    values = [value for name in scores.methods if (value := scores.values[name].get(key)) is not None]
    if len(values) < 2:
        return None
    return max(values) if scores.directions[key] == "higher" else min(values)


def comparisons(
    run: RunDirectory, over_seeds: Mapping[str, Sequence[Comparison]] = MappingProxyType({})
) -> tuple[dict[str, Comparison], str | None]:
    """Eq. 12-14 of the run, means over seeds where there are several, and the reason why some or all are not there."""
    if run.results is None:
        return {}, "They need the test scores of every model (results.json)."
    if not run.results.get("baseline"):
        return {}, "They compare with single-task models (STL), which this run does not train."
    try:
        found = compare(run.results)
    except UserError as error:
        return {}, f"They cannot be computed: {error}."
    deltas = {method: delta for method, delta in found.items() if delta is not None}
    unknown = [method for method in found if method not in deltas]
    why = f"Left out, since a test score is infinite: {listed(unknown)}." if unknown else None
    deltas |= {method: mean_comparison(each) for method, each in over_seeds.items() if method in deltas}
    return dict(sorted(deltas.items(), key=lambda item: item[0] == FINAL)), why


def seed_comparisons(run: RunDirectory) -> dict[str, list[Comparison]]:
    """Eq. 12-14 of every seed against the mean of the single-task models; empty when there is one seed.

    A method with an infinite score is left out: it has no mean either, as :func:`comparisons` says.
    """
    results = run.results or {}
    if not results.get("baseline"):
        return {}
    found = {}
    for method, tables in scores_by_seed(run).items():
        if method == SINGLE:
            continue
        methods = {str(number): table for number, table in enumerate(tables)}
        try:
            each = list(compare({**results, "methods": methods}).values())
        except UserError as error:
            run.damaged.append(f"results.json: seeds of {method}: {error}")
            continue
        known = [one for one in each if one is not None]
        if len(known) == len(each):
            found[method] = known
    return found


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def sampling_error(run: RunDirectory, method: str, *keys: str) -> float | None:
    """One of ``sampling_errors`` of ``results.json``, in percent; None where it is not known."""
    found: Any = (run.results or {}).get("sampling_errors")
    for key in (method, *keys):
        found = found.get(key) if isinstance(found, Mapping) else None
    return number(found)


def delta_rows(
    run: RunDirectory, deltas: Mapping[str, Comparison], over_seeds: Mapping[str, Sequence[Comparison]]
) -> list[dict[str, Any]]:
    """Delta I and Delta E of every method in percent, with errors of the test sampling and spreads over seeds."""
    rows = []
    for name, delta in deltas.items():
        each = over_seeds.get(name, ())
        compared = FINAL in deltas and name != FINAL
        apart = gaps(over_seeds, name) if compared else []
        rows.append(
            {
                "method": name,
                "delta_i": delta.delta_i,
                "error": sampling_error(run, name, "delta_i"),
                "delta_e": delta.delta_e,
                "spreads": {
                    "delta_i": spread([one.delta_i for one in each]),
                    "delta_e": spread([one.delta_e for one in each]),
                    "behind": spread(apart),
                },
                "behind": deltas[FINAL].delta_i - delta.delta_i if compared else None,
                "behind_error": sampling_error(run, name, "behind_final"),
                "tasks": [
                    (value, sampling_error(run, name, "per_task", task)) for task, value in delta.per_task.items()
                ],
            }
        )
    return rows


def headline(
    run: RunDirectory,
    scores: ScoreTable,
    deltas: Mapping[str, Comparison],
    over_seeds: Mapping[str, Sequence[Comparison]],
) -> list[str]:
    """Plain sentences about the outcome that claim no more than the numbers carry."""
    sentences = []
    if FINAL in deltas and EQUAL in deltas:
        difference = deltas[FINAL].delta_i - deltas[EQUAL].delta_i
        text = f"CoTBal − EW in ΔI: {difference:+.2f} percentage points"
        error = sampling_error(run, EQUAL, "behind_final")
        if error is None:
            sentences.append(f"{text}; the error of this difference is not known.")
        else:
            verdict = "more" if abs(difference) > 2 * error else "no more"
            sentences.append(
                f"{text}, {verdict} than two standard errors of the test sampling (one is {error:.2f} points); "
                f"{_seeds_sentence(over_seeds)}."
            )
    rests = [
        f"of {name} on {task} ({deltas[name].per_task[task]:+.0f} %)"
        for name in (FINAL, EQUAL)
        if name in deltas and (task := dominant_task(deltas[name])) is not None
    ]
    if rests:
        sentences.append(
            f"ΔI rests mostly on a single task, that {' and that '.join(rests)}: relative changes are large where the "
            "single-task score is small."
        )
    return sentences + learned(scores)


def _seeds_sentence(over_seeds: Mapping[str, Sequence[Comparison]]) -> str:
    each = gaps(over_seeds, EQUAL)
    if not each:
        return "how much another seed would move it is not in this figure"
    return f"from seed to seed it is {', '.join(f'{value:+.2f}' for value in each)}"


def gaps(over_seeds: Mapping[str, Sequence[Comparison]], method: str) -> list[float]:
    """How far CoTBal's Delta I is above the method's with every seed; empty where one of them is not known."""
    if FINAL not in over_seeds or method not in over_seeds:
        return []
    return [a.delta_i - b.delta_i for a, b in zip(over_seeds[FINAL], over_seeds[method], strict=True)]


def dominant_task(comparison: Comparison) -> str | None:
    """The task that makes up more than half of all relative change, when that change is above 50 %."""
    total = math.fsum(abs(value) for value in comparison.per_task.values())
    task = max(comparison.per_task, key=lambda name: abs(comparison.per_task[name]))
    value = abs(comparison.per_task[task])
    return task if len(comparison.per_task) > 1 and value > 50 and value > total / 2 else None


def learned(scores: ScoreTable) -> list[str]:
    """On how many tasks the final model beats what needs no image, by more than two standard errors."""
    method = scores.final
    if method is None:
        return []
    sentences = []
    for baseline, label in BASELINES.items():
        advantages = {key: scores.advantage(method, baseline, key) for key in scores.directions}
        known = {key: value for key, value in advantages.items() if value is not None}
        if not known:
            continue
        behind = [key for key, value in known.items() if value <= 2]
        text = (
            f"{method} beats the {label.replace(' ', '-')} baseline by more than two standard errors on "
            f"{len(known) - len(behind)} of {len(known)} test scores"
        )
        partly = {key[0] for key in known.keys() - {*behind}}
        names = dict.fromkeys(f"{task} ({score})" if task in partly else task for task, score in behind)
        if behind:
            text += f"; {'at chance' if baseline == 'majority' else 'not'} on {', '.join(names)}"
        sentences.append(text + ".")
    return sentences
