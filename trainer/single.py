"""``cotbal train``: one training on the full mixture with fixed weights, outside the pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from trainer.config import BUILT_IN, RunConfig
from trainer.errors import UserError, unknown_name
from trainer.launching import resolve_device, run_training
from trainer.pipeline.stages import write_json
from trainer.training import TrainingSpec

METHODS = ("ew", "tla", "cotbal")


def read_weights(path: Path, tasks: list[str]) -> dict[str, float]:
    """Task weights from the output of ``cotbal weights``, a run's ``weights.json``, or ``{task: weight}``.

    Raises:
        UserError: the file is missing or malformed, or names a task that the configuration does not have.
    """
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"weights file {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be an object, {{task: weight}} or the output of `cotbal weights`")
    if "weights" in content and "tasks" in content:
        names, values = content["tasks"], content.get("applied", content["weights"])
        if not isinstance(names, list) or not isinstance(values, list) or len(names) != len(values):
            raise UserError(f"{path}: 'tasks' and the weights must be lists of the same length")
        content = dict(zip(map(str, names), values, strict=True))
    for name, value in content.items():
        if name not in tasks:
            raise unknown_name(f"task in {path}", name, tasks)
        if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise UserError(f"{path}: the weight of '{name}' must be a finite number of at least 0, got {value!r}")
    return {name: float(value) for name, value in content.items()}


def train_once(config: RunConfig, output: Path, method: str, weights: Path | None) -> None:
    """Trains on everything with one method and leaves ``output/model``; run again, it resumes.

    Raises:
        UserError: an unknown method, missing weights, or tasks and a model that only a pipeline run can make.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if method == "cotbal" and weights is None:
        raise UserError("method 'cotbal' needs --weights (from `cotbal weights` or a run's weights.json)")
    if isinstance(config.tasks, str) or config.model.path == BUILT_IN:
        raise UserError(
            "`cotbal train` takes tasks and a model from disk; for the built-in ones run `cotbal demo` once and "
            "point at its folders data/ and trainings/pretraining/model/"
        )
    names = [task.name for task in config.tasks]
    aggregation: Literal["token", "task"] = "task" if method == "tla" else "token"
    spec = TrainingSpec(
        name=method,
        config=config,
        model_path=config.model.path,
        mixture="all",
        task_weights=read_weights(weights, names) if weights else {},
        aggregation=aggregation,
        output_dir=output,
    )
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "spec.json", spec.model_dump(mode="json"))
    device = resolve_device(config.launch.device)
    print(f"training; output goes to {output / 'output.log'}", file=sys.stderr)
    run_training(output / "spec.json", config.launch, device, 0, output / "output.log")
    print(f"model: {output / 'model'}")
