"""From evaluations to ``results.json``: methods, the STL baseline, standard errors, and what needs no image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.baselines import majority_answer, question_only
from trainer.config import RunConfig
from trainer.metrics import get_metric
from trainer.pipeline.stages import write_json
from trainer.pipeline.trainings import Training
from trainer.tasks import load_task

METHOD_LABELS = {"cotbal": "CoTBal", "ew": "EW"}
BASELINE = "STL"
Table = dict[str, dict[str, float]]  # task -> metric -> value


def read_metrics(directory: Path) -> dict[str, dict[str, Any]]:
    """``metrics.json`` of an evaluation: task to metric, value, standard error and samples."""
    return json.loads((directory / "metrics.json").read_text())


def write_results(run_dir: Path, config: RunConfig, finals: Sequence[Training]) -> None:
    """Writes ``results.json``, the input of ``cotbal compare``, with standard errors and baselines beside it."""
    values: dict[str, Table] = {}
    errors: dict[str, Table] = {}
    for training in finals:
        method = METHOD_LABELS.get(training.name, BASELINE)
        metrics = read_metrics(run_dir / "evaluations" / training.name / training.split)
        for name, entry in metrics.items():
            values.setdefault(method, {})[name] = {entry["metric"]: entry["value"]}
            errors.setdefault(method, {})[name] = {entry["metric"]: entry["standard_error"]}
    assert not isinstance(config.tasks, str)
    directions: dict[str, dict[str, str]] = {}
    baselines: dict[str, Table] = {"majority": {}, "question_only": {}}
    for task in [load_task(options) for options in config.tasks if options.test and options.metric]:
        assert task.config.metric is not None
        metric = get_metric(task.config.metric)
        directions[task.name] = {metric.label: "higher" if metric.higher_is_better else "lower"}
        seen = [(turn.question, [turn.answer]) for record in task.train for turn in record.turns]
        asked = [(record.turns[-1].question, record.answers) for record in task.test]
        majority, blind = majority_answer(seen, asked, metric), question_only(seen, asked, metric)
        baselines["majority"][task.name] = {metric.label: majority.value}
        baselines["question_only"][task.name] = {metric.label: blind.value}
    results: dict[str, Any] = {"tasks": directions}
    if BASELINE in values:
        results["baseline"] = values.pop(BASELINE)
    results |= {"methods": values, "standard_errors": errors, "baselines": baselines}
    write_json(run_dir / "results.json", results)
