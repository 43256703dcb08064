"""``cotbal train``: one training with any balancing method, outside the pipeline."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from trainer.balancing.registry import METHODS, SINGLE_TASK, check_name, is_cotbal, method_class
from trainer.config import BUILT_IN, RunConfig
from trainer.data.mixtures import Mixture, optimizer_steps
from trainer.errors import UserError, unknown_name
from trainer.files import write_json
from trainer.launching import ERROR_FILE, SAVE_FILE, LaunchConfig, resolve_device
from trainer.loop.checkpoints import complete_checkpoints
from trainer.loop.tracking import RUN_ID_FILE
from trainer.models.hub import pinned
from trainer.nodes import Cluster, Membership
from trainer.nodes.machine import log_of
from trainer.parsing import number, parse_json
from trainer.pipeline.identity import Identity
from trainer.pipeline.places import BASE_MODEL, PLAN, last_step
from trainer.pipeline.preflight import check_all, check_run, check_validation
from trainer.pipeline.progress import Progress
from trainer.pipeline.stages import Stage, StageContext, StageRunner, locked
from trainer.pipeline.trainings import Training, counted_sequences, still_methods
from trainer.training import TrainingSpec

# What a training leaves beside its model.
LEAVES = (
    "model.partial", "checkpoints", "log.jsonl", "weights.csv", "samples.json", "tensorboard", "output.log", ERROR_FILE,
    SAVE_FILE, RUN_ID_FILE,
)  # fmt: skip


def read_weights(path: Path, tasks: list[str]) -> dict[str, float]:
    """Task weights from the output of ``cotbal weights``, a run's ``weights.json``, or ``{task: weight}``.

    Raises:
        UserError: the file is missing or malformed, or its tasks are not the balanced ones of the configuration.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # no file, not UTF-8, not JSON
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
        weight = number(value)
        if weight is None or weight < 0:
            raise UserError(f"{path}: the weight of '{name}' must be a finite number of at least 0, got {value!r}")
    if missing := [name for name in tasks if name not in content]:
        raise UserError(f"{path} has no weight for {', '.join(missing)}; give every balanced task one")
    if not any(content.values()):
        raise UserError(f"{path}: every weight is 0, so nothing would be trained")
    return {name: float(value) for name, value in content.items()}


def refuse_idle_machines(launch: LaunchConfig) -> None:
    """Raise :class:`UserError` if one training leaves machines without work; asked on each, before they meet."""
    if launch.groups > 1:
        raise UserError(
            f"a single training has nothing to do for some of the {launch.nodes} machines; let it span all of them "
            f"with launch.nodes_per_training: {launch.nodes}"
        )


def train_once(
    config: RunConfig,
    output: Path,
    method: str | None,
    weights: Path | None,
    overwrite: bool = False,
    node: Membership | None = None,
) -> None:
    """Trains with one method and leaves ``output/model``; STL leaves ``output/<task>/model``.

    Run again it resumes, or does nothing when it is finished.

    Args:
        method: name; None is CoTBal when there are `weights`, else the configuration's.
        weights: for CoTBal.
        overwrite: delete a finished training, or checkpoints, of another configuration, other records or another model.
        node: this machine, which leads the others of ``launch.nodes``; None is a training of this machine alone.

    Raises:
        UserError: an unknown method, missing weights, tasks and a model that only a pipeline run can make, records,
            images or options that cannot be used, a training that would be lost, `output` is a run's, another
            process works in it, or a machine of several cannot take part.
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
    if (output / PLAN).exists():
        raise UserError(f"{output} is the run directory of a `cotbal run`, whose files it needs; give another --output")
    balanced = [task.name for task in config.tasks if not task.auxiliary]
    options = config.balancing.options.get(method, {})
    task_weights = read_weights(weights, balanced) if weights else {}
    trainings = {output: Training(method, Mixture("all"), (), (), method, options)}
    if method == SINGLE_TASK:
        trainings = {output / name: Training(f"stl-{name}", Mixture("single", name), (), ()) for name in balanced}
    identity, device = Identity(config, config.tasks, on_disk=True), resolve_device(config.launch.device)
    validates = any(method_class(training.method).needs.validation for training in trainings.values())

    model_path = config.model.path

    def check(context: StageContext) -> None:
        check_run(config, model_path, output / "tasks.json", context)
        if validates:
            check_validation(config, model_path, context)
        warn_of_still_methods()

    def warn_of_still_methods() -> None:  # from what the check has counted
        checked = json.loads((output / "tasks.json").read_text())["tasks"]
        training, window = config.training, config.training.batch_size * config.launch.ranks
        samples = sum(counted_sequences(config, checked).values())
        steps = optimizer_steps(samples, window, training.epochs, training.gradient_accumulation_steps)
        validation = {row["name"]: row["validation_records"] for row in checked if not row["auxiliary"]}
        if warning := still_methods(config, list(trainings.values()), [steps] * len(trainings), validation):
            progress.say(warning)

    def train(folder: Path, training: Training, context: StageContext) -> None:
        spec = TrainingSpec(
            name=training.name,
            config=config,
            model_path=model_path,
            mixture=training.mixture.kind,
            mixture_task=training.mixture.task,
            method=training.method,
            options=training.options,
            task_weights=task_weights,
            output_dir=folder,
        )
        write_json(folder / "spec.json", spec.model_dump(mode="json"))
        if (folder / "model").is_dir():  # killed between the end of the training and its manifest
            return
        print(f"training; output goes to {folder / 'output.log'}", file=sys.stderr)

        def poll() -> None:
            context.report(*last_step(folder / "log.jsonl"), "step")

        cluster.train(folder / "spec.json", context.slot, folder / "output.log", poll)

    other_logs = [log_of(Path("output.log"), rank).name for rank in range(1, config.launch.nodes)]
    stages = [Stage("check", identity.check() | {"validates": validates}, (), (output / "tasks.json",), check)]
    # One stage for a folder, whatever the method: its manifest tells whose the folder is.
    stages += [
        Stage(
            "-".join(["train", *folder.relative_to(output).parts]),
            identity.training(training) | {"weights": task_weights},
            (),
            (folder / "model",),
            partial(train, folder, training),
            after=("check",),
            costly=True,
            leaves=tuple(folder / name for name in (*LEAVES, *other_logs)),
            half_done=partial(_has_checkpoint, folder),
        )
        for folder, training in trainings.items()
    ]
    progress = Progress()
    with locked(output), Cluster(config, device, node or Membership(), output, progress.say) as cluster:
        model_path = pinned(model_path, output / BASE_MODEL)
        runner = StageRunner(output / "stages", stages, 1, progress)
        if runner.would_lose():  # a mistyped path must not cost what is finished
            check_all(config, model_path)
        runner.refuse_to_lose(overwrite)
        if runner.is_done(stages[0]) and not all(
            map(runner.is_done, stages)
        ):  # another method on records checked before
            warn_of_still_methods()
        runner.run(overwrite)
    for folder, training in trainings.items():
        entry = METHODS[training.method]
        if entry.moves and _stood_still(folder / "weights.csv", balanced):
            print(
                f"note: {entry.label} kept the same weights for the whole training, which ended before the method's "
                "windows or warm-up did: shorten those in balancing.options, or train longer",
                file=sys.stderr,
            )
        print(f"model: {folder / 'model'}")


def _has_checkpoint(folder: Path) -> bool:
    return bool(complete_checkpoints(folder))


def _stood_still(table: Path, tasks: Sequence[str]) -> bool:
    """Whether every step of a training used the same weights."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return all(len({row[task] for row in rows}) == 1 for task in tasks)
