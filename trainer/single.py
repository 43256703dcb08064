"""``cotbal train``: one training with any balancing method, outside the pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from trainer.balancing.registry import SINGLE_TASK, check_name, is_cotbal
from trainer.config import BUILT_IN, RunConfig
from trainer.errors import UserError, unknown_name
from trainer.launching import resolve_device, run_training
from trainer.pipeline.stages import write_json
from trainer.training import TrainingSpec


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


def train_once(config: RunConfig, output: Path, method: str | None, weights: Path | None) -> None:
    """Trains with one method and leaves ``output/model``; run again, it resumes. STL leaves ``output/<task>/model``.

    Args:
        method: name; None is CoTBal when there are `weights`, else the configuration's.
        weights: for CoTBal.

    Raises:
        UserError: an unknown method, missing weights, or tasks and a model that only a pipeline run can make.
    """
    method = method or ("cotbal" if weights else config.balancing.method)
    check_name(method)
    if is_cotbal(method) and weights is None:
        raise UserError(f"method '{method}' needs --weights (from `cotbal weights` or a run's weights.json)")
    if weights and not is_cotbal(method):
        raise UserError(f"method '{method}' finds its weights by itself; --weights is for 'cotbal'")
    if isinstance(config.tasks, str) or config.model.path == BUILT_IN:
        raise UserError(
            "`cotbal train` takes tasks and a model from disk; for the built-in ones run `cotbal demo` once and "
            "point at its folders data/ and trainings/pretraining/model/"
        )
    balanced = [task.name for task in config.tasks if not task.auxiliary]
    spec = TrainingSpec(
        name=method,
        config=config,
        model_path=config.model.path,
        mixture="all",
        method=method,
        options=config.balancing.options.get(method, {}),
        task_weights=read_weights(weights, balanced) if weights else {},
        output_dir=output,
    )
    specs = [spec]
    if method == SINGLE_TASK:
        update = {"method": "ew", "options": {}, "mixture": "single"}
        specs = [spec.model_copy(update=update | {"mixture_task": i, "output_dir": output / i}) for i in balanced]
    device = resolve_device(config.launch.device)
    for one in specs:
        one.output_dir.mkdir(parents=True, exist_ok=True)
        write_json(one.output_dir / "spec.json", one.model_dump(mode="json"))
        print(f"training; output goes to {one.output_dir / 'output.log'}", file=sys.stderr)
        if not (len(specs) > 1 and (one.output_dir / "model").is_dir()):  # STL continues where it was
            run_training(one.output_dir / "spec.json", config.launch, device, 0, one.output_dir / "output.log")
        print(f"model: {one.output_dir / 'model'}")
