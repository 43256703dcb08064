"""From evaluations to ``scores.json`` and ``results.json``: methods, the STL baseline, seeds, what needs no image."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.balancing.registry import METHODS, SINGLE_TASK_LABEL, training_label
from trainer.balancing.resampling import Influences, resampled
from trainer.balancing.scores import Scores
from trainer.baselines import ConstantAnswers
from trainer.config import CotbalConfig, RunConfig
from trainer.errors import UserError
from trainer.evaluation.scoring import compute, images_of, read_predictions, score_name, scores_by_task
from trainer.evaluation.spec import set_key
from trainer.files import known, write_json
from trainer.metrics import MetricResult, get_metric, takes_losses
from trainer.pipeline.trainings import Training
from trainer.sampling_errors import Sampled, sampling_errors
from trainer.task_config import TaskConfig
from trainer.tasks import load_tasks

Table = dict[str, dict[str, float]]  # task -> score, of a test set by a metric -> value
SampledOfSeeds = dict[tuple[str, str, str], list[Sampled]]  # (task, test set, score) -> of every seed


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
    assert not isinstance(config.tasks, str)
    by_seed: dict[str, list[Table]] = {}
    errors_by_seed: dict[str, list[Table]] = {}
    of_seeds: dict[str, SampledOfSeeds] = {}
    images = ImageNumbers()
    by_name = {task.name: task for task in config.tasks}
    for training in finals:
        method = training_label(training.name)
        scores = scores_by_task(read_metrics(run_dir / "evaluations" / training.name / "test"))
        rows = by_seed.setdefault(method, [{} for _ in range(config.seeds)])
        rows[training.repetition] |= {
            # An infinite perplexity.
            task: {name: math.nan if entry["value"] is None else entry["value"] for name, entry in own.items()}
            for task, own in scores.items()
        }
        # Of the answers, not of metrics.json: an older version may have written that with errors of another kind.
        rows = errors_by_seed.setdefault(method, [{} for _ in range(config.seeds)])
        for own_task in (by_name[name] for name in training.tasks):
            moved = rows[training.repetition].setdefault(own_task.name, {})
            for part in own_task.record_files("test"):
                found, of_samples = _scored(run_dir, training.name, "test", own_task, part)
                images.add(own_task, part, of_samples)
                for name, result in found.items():
                    score, grouped = score_name(part, name), result.of_groups(of_samples)
                    moved[score] = grouped.standard_error
                    own = Sampled(np.array(result.influences), grouped.unseen)
                    of_seeds.setdefault(method, {}).setdefault((own_task.name, part, score), []).append(own)
    values = {method: _known(mean_table(tables)) for method, tables in by_seed.items()}
    errors = {method: _known(mean_table(tables)) for method, tables in errors_by_seed.items()}
    directions: dict[str, dict[str, str]] = {}
    baselines: dict[str, Table] = {"majority": {}, "question_only": {}}
    scored = [options for options in config.tasks if options.test and not options.auxiliary]
    for task in load_tasks(scored, ("train", "test")):
        seen = [(turn.question, [turn.answer]) for record in task.train for turn in record.turns]
        metrics = [get_metric(name) for name in task.config.scored_with("test")]
        # A constant answer has no perplexity.
        constants = {own.name: ConstantAnswers(seen, own) for own in metrics if not takes_losses(own.name)}
        for part, records in task.test_sets.items():
            asked = [(record.turns[-1].question, record.answers) for record in records]
            for metric in metrics:
                name = score_name(part, metric.name)
                directions.setdefault(task.name, {})[name] = "higher" if metric.higher_is_better else "lower"
                if constant := constants.get(metric.name):
                    baselines["majority"].setdefault(task.name, {})[name] = constant.majority(asked).value
                    baselines["question_only"].setdefault(task.name, {})[name] = constant.question_only(asked).value
    results: dict[str, Any] = {"tasks": directions}
    if SINGLE_TASK_LABEL in values:
        results["baseline"] = values.pop(SINGLE_TASK_LABEL)
    results |= {"methods": values, "standard_errors": errors, "baselines": baselines}
    if "baseline" in results:
        samples = {method: _mean_samples(own) for method, own in of_seeds.items()}
        baseline = samples.pop(SINGLE_TASK_LABEL)
        final = METHODS["cotbal"].label
        results["sampling_errors"] = sampling_errors(results, samples, baseline, images.of_sets, final)
    if config.seeds > 1:
        results["seeds"] = {method: list(map(_known, tables)) for method, tables in by_seed.items()}
    write_json(run_dir / "results.json", results)


def weight_errors(run_dir: Path, config: RunConfig, scores: Scores, options: CotbalConfig) -> dict[str, Any]:
    """How far other validation samples would move the weights, see :func:`trainer.balancing.resampling.resampled`."""
    assert not isinstance(config.tasks, str)
    found = []
    for task in (task for task in config.tasks if task.name in scores.tasks):
        trainings = ["mini", *(f"plus-{name}" for name in scores.tasks)]
        if options.difficulty == "precise":
            trainings += [f"alone-{task.name}", f"stl-{task.name}"]
        each = [_scored(run_dir, name, "validation", task, "") for name in trainings]
        grouped = [result.of_groups(images) for results, images in each for result in results.values()]
        found.append(
            Influences(np.array([one.influences for one in grouped]), np.array([one.unseen for one in grouped]))
        )
    own = options.model_dump(include={"temperature", "alpha", "difficulty"})
    return resampled(scores, found, options.strategy, config.seed, **own)


class ImageNumbers:
    """Numbers the images of all test sets; the same file has the same number in all of them.

    Attributes:
        of_sets: by task and test set, the number of each sample's image; a sample without one has its own.
    """

    def __init__(self) -> None:
        self.of_sets: dict[str, dict[str, NDArray[np.int64]]] = {}
        self._numbers: dict[Hashable, int] = {}

    def add(self, task: TaskConfig, part: str, images: Sequence[str | None]) -> None:
        keys = [
            (task.name, part, place) if image is None else os.path.abspath(task.image_root / image)
            for place, image in enumerate(images)
        ]
        numbers = [self._numbers.setdefault(key, len(self._numbers)) for key in keys]
        self.of_sets.setdefault(task.name, {})[part] = np.array(numbers)


def _scored(
    run_dir: Path, training: str, split: str, task: TaskConfig, part: str
) -> tuple[dict[str, MetricResult], list[str | None]]:
    """The training's scores on a set by metric, and the image of each sample."""
    metrics = task.scored_with(split)
    losses = takes_losses(metrics[0])
    path = run_dir / "evaluations" / training / split / f"{set_key(task.name, part)}.jsonl"
    rows = read_predictions(path, answers=not losses, losses=losses)
    return {metric: compute(metric, rows) for metric in metrics}, images_of(rows)


def _mean_samples(of_seeds: SampledOfSeeds) -> dict[str, dict[str, dict[str, Sampled]]]:
    """What is known of a method's test samples, by task, test set and score; means over seeds."""
    found: dict[str, dict[str, dict[str, Sampled]]] = {}
    for (task, part, score), seeds in of_seeds.items():
        mean = Sampled(np.mean([one.influences for one in seeds], axis=0), fmean(one.unseen for one in seeds))
        found.setdefault(task, {}).setdefault(part, {})[score] = mean
    return found


def _known(table: Table) -> dict[str, dict[str, float | None]]:
    return {task: {metric: known(value) for metric, value in metrics.items()} for task, metrics in table.items()}


def mean_table(tables: Sequence[Table]) -> Table:
    """The mean of tables with the same tasks and metrics."""
    return {
        task: {metric: fmean(table[task][metric] for table in tables) for metric in metrics}
        for task, metrics in tables[0].items()
    }
