"""From evaluations to ``scores.json`` and ``results.json``: methods, the STL baseline, seeds, what needs no image."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.balancing.registry import METHODS, SINGLE_TASK_LABEL, training_label
from trainer.balancing.resampling import Influences, resampled
from trainer.balancing.scores import Scores
from trainer.baselines import majority_answer, question_only
from trainer.config import CotbalConfig, RunConfig
from trainer.errors import UserError
from trainer.evaluation.scoring import compute, read_predictions, score_name, scores_by_task
from trainer.evaluation.spec import set_key
from trainer.files import known, write_json
from trainer.metrics import get_metric, takes_losses
from trainer.pipeline.trainings import Training
from trainer.sampling_errors import Array, sampling_errors
from trainer.task_config import TaskConfig
from trainer.tasks import load_task

Table = dict[str, dict[str, float]]  # task -> score, of a test set by a metric -> value


def read_metrics(directory: Path) -> dict[str, dict[str, Any]]:
    """``metrics.json`` of an evaluation: every score's metric, value, standard error and samples."""
    return json.loads((directory / "metrics.json").read_text())


def score_table(run_dir: Path, config: RunConfig, precise: bool) -> dict[str, Any]:
    """``scores.json``: V_j of every proxy, and of the models of one task alone for the precise difficulty.

    Raises:
        UserError: a perplexity is infinite.
    """
    assert not isinstance(config.tasks, str)
    metrics = {task.name: get_metric(task.metric) for task in config.tasks if not task.auxiliary and task.metric}

    def scores(training: str) -> dict[str, float]:
        evaluated = read_metrics(run_dir / "evaluations" / training / "validation")
        for name, entry in evaluated.items():
            if entry["value"] is None:
                raise UserError(
                    f"task '{name}': the {entry['metric']} of '{training}' on validation records is infinite, so Eq. 3 "
                    "has no value; lower training.learning_rate"
                )
        return {name: entry["value"] for name, entry in evaluated.items()}

    table: dict[str, Any] = {
        "tasks": list(metrics),
        "mini": scores("mini"),
        "full": {name: scores(f"plus-{name}") for name in metrics},
        "higher_is_better": {name: metric.higher_is_better for name, metric in metrics.items()},
    }
    if precise:
        alone = {"mini": "alone", "full": "stl"}
        table["alone"] = {
            key: {name: scores(f"{kind}-{name}")[name] for name in metrics} for key, kind in alone.items()
        }
    return table


def write_results(run_dir: Path, config: RunConfig, finals: Sequence[Training]) -> None:
    """Writes ``results.json``, the input of ``cotbal compare``, with standard errors and baselines beside it.

    ``sampling_errors`` are of Delta I (:mod:`trainer.sampling_errors`). With several seeds, values and
    standard errors (of the test sampling) are means over seeds, and ``seeds`` has the values of each:
    ``{method: [task -> score -> value, ...]}``.
    """
    by_seed: dict[str, list[Table]] = {}
    errors_by_seed: dict[str, list[Table]] = {}
    for training in finals:
        method = training_label(training.name)
        scores = scores_by_task(read_metrics(run_dir / "evaluations" / training.name / "test"))
        for tables, key in ((by_seed, "value"), (errors_by_seed, "standard_error")):
            rows = tables.setdefault(method, [{} for _ in range(config.seeds)])
            rows[training.repetition] |= {
                # An infinite perplexity, and the standard error of a single sample.
                task: {name: math.nan if entry[key] is None else entry[key] for name, entry in own.items()}
                for task, own in scores.items()
            }
    values = {method: _known(mean_table(tables)) for method, tables in by_seed.items()}
    errors = {method: _known(mean_table(tables)) for method, tables in errors_by_seed.items()}
    assert not isinstance(config.tasks, str)
    directions: dict[str, dict[str, str]] = {}
    baselines: dict[str, Table] = {"majority": {}, "question_only": {}}
    scored = [options for options in config.tasks if options.test and not options.auxiliary]
    for task in (load_task(options, ("train", "test")) for options in scored):
        seen = [(turn.question, [turn.answer]) for record in task.train for turn in record.turns]
        for part, records in task.test_sets.items():
            asked = [(record.turns[-1].question, record.answers) for record in records]
            for metric in map(get_metric, task.config.scored_with("test")):
                name = score_name(part, metric.name)
                directions.setdefault(task.name, {})[name] = "higher" if metric.higher_is_better else "lower"
                if takes_losses(metric.name):  # a constant answer has no perplexity
                    continue
                majority, blind = majority_answer(seen, asked, metric), question_only(seen, asked, metric)
                baselines["majority"].setdefault(task.name, {})[name] = majority.value
                baselines["question_only"].setdefault(task.name, {})[name] = blind.value
    results: dict[str, Any] = {"tasks": directions}
    if SINGLE_TASK_LABEL in values:
        results["baseline"] = values.pop(SINGLE_TASK_LABEL)
    results |= {"methods": values, "standard_errors": errors, "baselines": baselines}
    if "baseline" in results:
        tasks = {task.name: task for task in config.tasks}
        samples = {
            method: _mean_samples(run_dir, tasks, [t for t in finals if training_label(t.name) == method])
            for method in by_seed
        }
        baseline = samples.pop(SINGLE_TASK_LABEL)
        results["sampling_errors"] = sampling_errors(results, samples, baseline, METHODS["cotbal"].label)
    if config.seeds > 1:
        results["seeds"] = {method: list(map(_known, tables)) for method, tables in by_seed.items()}
    write_json(run_dir / "results.json", results)


def weight_errors(run_dir: Path, config: RunConfig, scores: Scores, options: CotbalConfig) -> dict[str, Any]:
    """How far other validation samples would move the weights, see :func:`trainer.balancing.resampling.resampled`."""
    assert not isinstance(config.tasks, str)
    precise = options.difficulty == "precise"
    found = []
    for task in (task for task in config.tasks if task.name in scores.tasks):

        def moved(*trainings: str, task: TaskConfig = task) -> Array:
            each = [_influences(run_dir, name, "validation", task, "") for name in trainings]
            return np.array([influences for one in each for influences in one.values()])

        alone = moved(f"alone-{task.name}", f"stl-{task.name}") if precise else None
        found.append(Influences(moved("mini")[0], moved(*(f"plus-{name}" for name in scores.tasks)), alone))
    own = options.model_dump(include={"temperature", "alpha", "difficulty"})
    return resampled(scores, found, options.strategy, config.seed, **own)


def _influences(run_dir: Path, training: str, split: str, task: TaskConfig, part: str) -> dict[str, list[float]]:
    """Of the samples of a set on the training's scores, by metric."""
    metrics = task.scored_with(split)
    losses = takes_losses(metrics[0])
    path = run_dir / "evaluations" / training / split / f"{set_key(task.name, part)}.jsonl"
    rows = read_predictions(path, answers=not losses, losses=losses)
    return {metric: compute(metric, rows).influences for metric in metrics}


def _mean_samples(
    run_dir: Path, tasks: Mapping[str, TaskConfig], trainings: Sequence[Training]
) -> dict[str, dict[str, dict[str, Array]]]:
    """Influences of the test samples on a method's scores, by task, test set and score; means over seeds."""
    each: dict[tuple[str, str, str], list[list[float]]] = {}
    for training in trainings:
        for task in (tasks[name] for name in training.tasks):
            for part in task.record_files("test"):
                for metric, moved in _influences(run_dir, training.name, "test", task, part).items():
                    each.setdefault((task.name, part, score_name(part, metric)), []).append(moved)
    found: dict[str, dict[str, dict[str, Array]]] = {}
    for (name, part, score), seeds in each.items():
        found.setdefault(name, {}).setdefault(part, {})[score] = np.mean(seeds, axis=0)
    return found


def _known(table: Table) -> dict[str, dict[str, float | None]]:
    return {task: {metric: known(value) for metric, value in metrics.items()} for task, metrics in table.items()}


def mean_table(tables: Sequence[Table]) -> Table:
    """The mean of tables with the same tasks and metrics."""
    return {
        task: {metric: statistics.fmean(table[task][metric] for table in tables) for metric in metrics}
        for task, metrics in tables[0].items()
    }
