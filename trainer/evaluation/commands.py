"""The commands ``evaluate`` and ``score``."""

from __future__ import annotations

import json
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.errors import UserError, unknown_name, writing

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.evaluation.spec import EvaluationSet

_NAME = "predictions"
_METRIC = "of docs/data.md; may be given again"
Metrics = Annotated[list[str] | None, typer.Option("--metric", help=_METRIC)]


def evaluate(
    model: Annotated[str, typer.Argument(help="folder of a trained model, or a hub's NAME or NAME@REVISION")],
    output: Annotated[Path, typer.Option(help="folder for predictions.jsonl and metrics.json, for this alone")],
    records: Annotated[list[Path] | None, typer.Option(help="a file of records; may be given again")] = None,
    config: Annotated[Path | None, typer.Option(help="take records and options from a task of this YAML")] = None,
    task: Annotated[str | None, typer.Option(help="the task of CONFIG")] = None,
    split: Annotated[str, typer.Option(help="validation | test, of the task")] = "test",
    test_set: Annotated[str | None, typer.Option(help="which of the task's test sets, where it has several")] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help=f"{_METRIC}; none: RECORDS are answered and not scored")
    ] = None,
    image_root: Annotated[Path | None, typer.Option(help="folder of the records' images")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first so many records, in file order")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="records at once; default 32")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="longest answer; default 32")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 | bf16; default bf16")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="ranks (GPUs) that share the work; default 1")] = None,
    device: Annotated[str | None, typer.Option(help="auto | cpu | cuda")] = None,
    threads: Annotated[int | None, typer.Option(min=0, help="CPU threads of a rank; 0 = cores shared evenly")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace another evaluation in OUTPUT")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Answer the questions of records with a model and score the answers. Run it again to continue."""
    from trainer.config import EvaluationConfig, ModelConfig, TrainingConfig, load_config
    from trainer.evaluation.progress import Display
    from trainer.evaluation.ranks import RankProcesses
    from trainer.evaluation.running import evaluate as run
    from trainer.evaluation.spec import EvaluationSet, EvaluationSpec
    from trainer.launching import LaunchConfig, rank_devices, resolve_device, threads_per_process
    from trainer.metrics import get_metric
    from trainer.models.hub import model_folder

    if (config is None) == (records is None):
        raise UserError("`evaluate` takes either --records FILE (again for more), or --config CONFIG with --task TASK")
    if test_set is not None and (config is None or split != "test"):
        raise UserError("--test-set names one of the test sets of a task: it needs --config, --task and --split test")
    _check_choice("--precision", precision, ("fp32", "bf16"))
    _check_choice("--device", device, ("auto", "cpu", "cuda"))
    for name in metric or []:
        get_metric(name)

    launch, options, training, own_model = LaunchConfig(), EvaluationConfig(), TrainingConfig(), ModelConfig()
    features = None
    if config is not None:
        whole = load_config(config)
        launch, options, training, own_model = whole.launch, whole.evaluation, whole.training, whole.model
        chosen, features = _of_task(whole, task, split, test_set)
    else:
        chosen = EvaluationSet(_NAME, tuple(records or ()), Path("."), (), 32)
    launch = launch.model_copy(
        update={
            "parallel": 1,
            "processes": processes or launch.processes,
            "threads": launch.threads if threads is None else threads,
        }
    )
    chosen = EvaluationSet(
        _NAME,
        tuple(path.absolute() for path in chosen.files),
        (image_root or chosen.image_root).absolute(),
        tuple(dict.fromkeys(metric or chosen.metrics)),
        max_new_tokens or chosen.max_new_tokens,
        limit,
        task=chosen.task,
    )
    spec = EvaluationSpec(
        model_path=model_folder(model, weights=True).absolute(),
        sets=(chosen,),
        output_dir=output.absolute(),
        batch_size=batch_size or options.batch_size,
        precision=precision or training.precision,  # type: ignore[arg-type]  # checked above
        devices=rank_devices(resolve_device(device or launch.device), launch.processes),
        threads=threads_per_process(launch),
        attention=own_model.attention,
        max_length=own_model.max_length,
        features=features,
        images=own_model.images,
        overwrite=overwrite,
    )
    ranks = closing(RankProcesses(launch.processes)) if launch.processes > 1 else nullcontext()
    with writing(output), ranks as running, nullcontext(lambda meter: None) if quiet else Display() as report:
        metrics = run(spec, running, report)
    typer.echo(json.dumps(metrics, indent=2))


def score(
    predictions: Annotated[Path, typer.Argument(help="JSONL with `prediction` and `references` in every line")],
    metric: Metrics = None,
) -> None:
    """Score predictions from anywhere, without a model: value, standard error and samples as JSON."""
    from trainer.evaluation.scoring import score_file

    if not metric:
        raise UserError("`score` needs at least one --metric")
    typer.echo(json.dumps(score_file(predictions, metric), indent=2))


def add_commands(app: typer.Typer) -> None:
    """Adds ``evaluate`` and ``score`` to the command line."""
    app.command()(evaluate)
    app.command()(score)


def _of_task(
    config: RunConfig, name: str | None, split: str, test_set: str | None
) -> tuple[EvaluationSet, Path | None]:
    """A task's records as a set, and the run's cached features where its model is the built-in one."""
    from trainer.config import BUILT_IN
    from trainer.evaluation.spec import EvaluationSet
    from trainer.pipeline.built_in import task_configs

    _check_choice("--split", split, ("validation", "test"))
    run_dir = config.output_dir
    tasks = task_configs(run_dir / "data", config.built_in) if isinstance(config.tasks, str) else config.tasks
    by_name = {task.name: task for task in tasks}
    if name is None:
        raise UserError(f"--config needs --task, one of {', '.join(by_name)}")
    if name not in by_name:
        raise unknown_name("task", name, by_name)
    task = by_name[name]
    files = task.record_files(split)
    if not files:
        raise UserError(f"task '{name}' has no {split} records")
    if test_set is None:
        if len(files) > 1:
            raise UserError(f"task '{name}' has several test sets; name one with --test-set: {', '.join(files)}")
        (test_set,) = files
    if "" in files and test_set:
        raise UserError(f"task '{name}' has one test file, without a name; leave out --test-set")
    if test_set not in files:
        raise unknown_name("test set", test_set, files)
    features = run_dir / "features" if config.model.path == BUILT_IN else None
    metrics = task.scored_with(split)
    own = EvaluationSet(_NAME, (files[test_set],), task.image_root, metrics, task.max_new_tokens, task=task.name)
    return own, features


def _check_choice(option: str, value: str | None, valid: tuple[str, ...]) -> None:
    if value is not None and value not in valid:
        raise UserError(f"{option} must be one of {', '.join(valid)}, got '{value}'")
