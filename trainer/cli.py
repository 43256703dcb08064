"""The ``cotbal`` command."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trainer.data.commands import add_commands
from trainer.errors import UserError, writing
from trainer.evaluation.commands import add_commands as add_evaluation_commands
from trainer.options import MOST_EPOCHS
from trainer.parsing import parse_json
from trainer.settings import parse_settings

_CONTINUE = ("demo", "run", "train", "evaluate", "convert")  # commands that go on where they were


class _Commands(TyperGroup):
    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Every command with its first sentence, whole: click cuts it where the line ends."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, (command.help or "").partition(". ")[0].rstrip(".")) for name, command in self.commands.items()]
            )

    def invoke(self, ctx: Any) -> Any:
        """Runs a command; an interruption ends here, because typer makes it an exit code without a word."""
        try:
            return super().invoke(ctx)
        except BaseException as error:
            interruption = _interruption_in(error)
            if interruption is None:
                raise
            more = "; the same command continues from here" if ctx.invoked_subcommand in _CONTINUE else ""
            code = 143 if interruption else 130
            for again in (signal.SIGINT, signal.SIGTERM):  # one more, while threads end, has nothing to add
                signal.signal(again, lambda *_: os._exit(code))
            print(f"cotbal: {interruption or 'interrupted'}{more}", file=sys.stderr)
            raise typer.Exit(code) from error


def _interruption_in(error: BaseException | None) -> str | None:
    """The text of the interruption that an error is, or came of: amid an import, transformers makes it another one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return None if error is None else str(error)


def _finite(value: float | None) -> float | None:
    """``min`` lets infinity pass."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


app = typer.Typer(
    cls=_Commands,
    help="CoTBal: comprehensive task balancing for multi-task visual instruction tuning.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(help="YAML configuration; see docs/configuration.md")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. training.epochs=2")
]
Methods = Annotated[
    str | None, typer.Option(help="compare with these balancing methods, e.g. ew,tla,rlw,coba (stl is always there)")
]
Seeds = Annotated[
    int | None, typer.Option(min=1, help="train every final model with this many seeds, for means and spreads")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print stages, steps and cost, and stop")]
NodeRank = Annotated[
    int | None,
    typer.Option(help="which of launch.nodes machines this is, from 0; default: as SLURM says"),
]
Master = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="where node 0 listens, port 29400 if not said; default: as SLURM says"),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="delete work already done that the configuration or data no longer fits")
]


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="run directory")] = Path("runs/demo"),
    small: Annotated[
        bool, typer.Option("--small", help="minutes instead of a quarter of an hour; learns little")
    ] = False,
    methods: Methods = None,
    seeds: Seeds = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    node_rank: NodeRank = None,
    master: Master = None,
    overrides: Overrides = None,
) -> None:
    """Run the whole of Algorithm 1 on built-in tasks and write a report. Run it again to continue."""
    preset = Path(__file__).parent / "configs" / ("demo_small.yaml" if small else "demo.yaml")
    own = {"output_dir": str(output), **_final_trainings(methods, seeds), **parse_settings(overrides)}
    _run(preset, own, dry_run, overwrite, node_rank, master)


@app.command()
def run(
    config: ConfigPath,
    methods: Methods = None,
    seeds: Seeds = None,
    dry_run: DryRun = False,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=0.001, callback=_finite, help="for --dry-run: peak TFLOP/s of one GPU; default: this machine's"
        ),
    ] = None,
    mfu: Annotated[
        float, typer.Option(min=0.001, max=1, help="for --dry-run: share of the peak that is reached")
    ] = 0.4,
    overwrite: Overwrite = False,
    node_rank: NodeRank = None,
    master: Master = None,
    overrides: Overrides = None,
) -> None:
    """Run the pipeline of CONFIG. Run it again after an interruption: it continues where it was."""
    own = {**_final_trainings(methods, seeds), **parse_settings(overrides)}
    _run(config, own, dry_run, overwrite, node_rank, master, tflops, mfu)


@app.command()
def train(
    config: ConfigPath,
    output: Annotated[Path, typer.Option(help="folder for model/, log.jsonl and tensorboard/")],
    method: Annotated[
        str | None, typer.Option(help="a balancing method (docs/balancing.md); default: balancing.method of CONFIG")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="for cotbal: JSON of `cotbal weights`, or {task: weight}")
    ] = None,
    overwrite: Overwrite = False,
    node_rank: NodeRank = None,
    master: Master = None,
    overrides: Overrides = None,
) -> None:
    """Train once on the tasks of CONFIG with one balancing method. Run it again to continue."""
    from trainer.config import load_config
    from trainer.nodes import find_membership, follow
    from trainer.single import refuse_idle_machines, train_once

    loaded = load_config(config, parse_settings(overrides))
    refuse_idle_machines(loaded.launch)
    node = find_membership(loaded.launch, node_rank, master)
    if node.rank > 0:
        follow(loaded, node)
        return
    with writing(output):
        train_once(loaded, output.absolute(), method, weights, overwrite, node)


@app.command()
def weights(
    scores: Annotated[
        Path, typer.Argument(help="SCORES.json: {tasks, mini: {j: V}, full: {i: {j: V}}}; docs/balancing.md")
    ],
    temperature: Annotated[float, typer.Option(help="T of Eq. 5, 7, 10")] = 0.5,
    alpha: Annotated[float, typer.Option(help="alpha of Eq. 11")] = 0.5,
    on_degenerate: Annotated[
        str, typer.Option(help="error | clip: when V_j(j+mini) exceeds V_j(mini) by 1 % at most")
    ] = "error",
    difficulty: Annotated[
        str, typer.Option(help="reused | precise: Eq. 9 from the proxies, or from {alone: {mini, full}}")
    ] = "reused",
) -> None:
    """Print task weights, contributions and difficulties for a table of validation scores (equations 3-11)."""
    from trainer.balancing.cotbal import DegenerateScoresError, cotbal_weights
    from trainer.balancing.scores import Scores

    table = Scores.from_json(_read_json(scores))
    try:
        result = cotbal_weights(table, temperature, alpha, on_degenerate, difficulty=difficulty)
    except DegenerateScoresError as error:
        raise UserError(f"{error}: --on-degenerate clip") from error
    typer.echo(json.dumps(result.to_json(), indent=2))


@app.command()
def compare(
    results: Annotated[Path, typer.Argument(help="RESULTS.json: {tasks, baseline, methods}; docs/evaluation.md")],
) -> None:
    """Print Delta I% and Delta E% of every method against the baseline (equations 12-14)."""
    from trainer.comparison import compare_to_json

    typer.echo(json.dumps(compare_to_json(_read_json(results)), indent=2))


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="a run directory, finished or not")]) -> None:
    """Write RUN_DIR/report.html from what the run has so far."""
    from trainer.report import build_report

    with writing(run_dir):
        typer.echo(build_report(run_dir))


@app.command()
def check(
    paths: Annotated[list[Path], typer.Argument(help="one CONFIG.yaml, or files of records (.json, .jsonl)")],
    overrides: Overrides = None,
    image_root: Annotated[Path | None, typer.Option(help="folder of the images of record files")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="model folder, for lengths of record files in tokens")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=16, help="tokens; longer conversations are cut; default 2048")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="for the number of steps; default 16")] = None,
    epochs: Annotated[
        float | None,
        typer.Option(min=0, max=MOST_EPOCHS, callback=_finite, help="for the number of steps; default 1"),
    ] = None,
) -> None:
    """Check records, images and tokens without training anything: of every task in CONFIG, or of record files."""
    from trainer.config import load_config
    from trainer.data.commands import check_records
    from trainer.pipeline.preflight import check_config

    of_files = {
        "--image-root": image_root,
        "--tokenizer": tokenizer,
        "--max-length": max_length,
        "--batch-size": batch_size,
        "--epochs": epochs,
    }
    given = [name for name, value in of_files.items() if value is not None]
    if all(path.suffix in (".json", ".jsonl") for path in paths):
        if overrides:
            raise UserError("--set overrides a key of CONFIG.yaml; record files have none")
        check_records(
            paths, image_root, tokenizer, max_length or 2048, batch_size or 16, 1.0 if epochs is None else epochs
        )
    elif len(paths) == 1:
        if given:
            raise UserError(f"{', '.join(given)}: of record files only; CONFIG.yaml has its own, which --set overrides")
        typer.echo(check_config(load_config(paths[0], parse_settings(overrides))))
    else:
        raise UserError("`check` takes one CONFIG.yaml, or files of records (.json, .jsonl)")


add_commands(app)
add_evaluation_commands(app)


@app.command()
def doctor() -> None:
    """Say what this machine can do: packages, GPUs, loss backends."""
    from trainer.doctor import diagnose

    typer.echo(diagnose())


def _run(
    path: Path,
    overrides: dict[str, Any],
    dry_run: bool,
    overwrite: bool,
    node_rank: int | None,
    master: str | None,
    tflops: float | None = None,
    mfu: float = 0.4,
) -> None:
    from trainer.config import load_config
    from trainer.nodes import find_membership, follow
    from trainer.pipeline.algorithm1 import Pipeline
    from trainer.pipeline.built_in import planned_records
    from trainer.pipeline.places import PLAN, RESOLVED
    from trainer.pipeline.trainings import few_steps, plan, still_methods

    config = load_config(path, overrides)
    kept = config.output_dir / RESOLVED
    if kept.exists() and kept.samefile(path) and not (config.output_dir / PLAN).exists():
        raise UserError(
            f"{path} would be replaced by the run, which keeps its resolved configuration under this name; rename it, "
            "or choose another output_dir"
        )
    node = None if dry_run else find_membership(config.launch, node_rank, master)
    if node is not None and node.rank > 0:
        follow(config, node)
        return
    pipeline = Pipeline(config, node=node)
    if dry_run and not isinstance(config.tasks, str):
        from trainer.pipeline.estimate import report
        from trainer.pipeline.planned_data import planned_data

        data = planned_data(config, pipeline.tasks)
        records, validation = {name: len(found) for name, found in data.tasks.items()}, data.validation
        rows = plan(config, pipeline.trainings, records, data)
        typer.echo(f"{_plan_table(rows)}\n{report(config, rows, data, tflops, mfu)}")
    elif dry_run:
        rows = plan(config, pipeline.trainings, planned_records(config.built_in, pipeline.tasks))
        balanced = [task for task in pipeline.tasks if not task.auxiliary]
        validation = planned_records(config.built_in, balanced, "validation")
        typer.echo(_plan_table(rows))
    else:
        with writing(config.output_dir):
            typer.echo(f"report: {pipeline.run(overwrite)}")
        return
    still = still_methods(config, pipeline.trainings, [row["steps"] for row in rows], validation)
    for warning in filter(None, (few_steps(rows), still)):
        typer.echo(warning)
    if pipeline.run_dir.is_dir():
        typer.echo(pipeline.runner().summary())


def _plan_table(rows: list[dict[str, Any]]) -> str:
    width = max(28, *(len(row["training"]) + 1 for row in rows))
    lines = [f"{'training':<{width}}{'records':>9}{'steps':>8}{'cost':>8}  scored on"]
    lines += [
        f"{row['training']:<{width}}{row['records']:>9}{row['steps']:>8}{row['cost']:>8.2f}  {row['scored on']}"
        for row in rows
    ]
    proxies = sum(row["cost"] for row in rows if "validation" in row["scored on"])
    total = sum(row["cost"] for row in rows)
    lines.append(
        f"cost is in units of the final training, by records: proxies {proxies:.2f} "
        f"(what CoTBal adds to a plain training), everything {total:.2f}"
    )
    return "\n".join(lines)


def _final_trainings(methods: str | None, seeds: int | None) -> dict[str, Any]:
    """``--methods`` and ``--seeds`` as keys of the configuration."""
    overrides: dict[str, Any] = {} if seeds is None else {"seeds": seeds}
    if methods is not None:
        names = [name.strip() for name in methods.split(",") if name.strip()]
        overrides["comparisons"] = ["stl", *(name for name in names if name != "stl")]
    return overrides


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def main() -> None:
    """Console entry point: a user's mistake, or a path that cannot be used, is one line on stderr."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from trainer.launching import TrainingFailedError, save_on_signal, stop_on_signal

    save_on_signal()
    stop_on_signal()
    try:
        app()
    except (UserError, TrainingFailedError) as error:
        print(f"cotbal: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:  # nothing that a path explains: a defect, or a library's own error
            raise
        print(f"cotbal: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
