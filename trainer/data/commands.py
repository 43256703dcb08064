"""The ``convert`` command, and ``check`` for record files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.errors import UserError, writing
from trainer.settings import parse_settings


def convert(
    name: Annotated[str, typer.Argument(help="a data set (docs/data.md), or `list` to see them")],
    source: Annotated[Path | None, typer.Argument(help="folder or file of the raw data")] = None,
    output: Annotated[Path | None, typer.Argument(help="folder of the records, for this conversion alone")] = None,
    preset: Annotated[str | None, typer.Option(help="cotbal-paper: the processing of CoTBal section 4.1")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="read only so many raw records of each file")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of sampling and shuffling")] = 0,
    image_root: Annotated[
        Path | None, typer.Option(help="check that every image is there, below this folder, and is an image")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override an option, e.g. validation=5000")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: one for each core")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace another conversion in OUTPUT")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bar")] = False,
) -> None:
    """Convert a raw data set to records. Run it again after an interruption: it continues where it was."""
    from trainer.data.converters.conversion import convert as run
    from trainer.data.converters.registry import CONVERTERS, get_converter
    from trainer.launching import usable_cores

    if name == "list":
        width = max(map(len, CONVERTERS))
        for converter in CONVERTERS.values():
            typer.echo(f"{converter.name:<{width}}  {converter.summary}\n{'':<{width}}  needs {converter.files}")
        return
    if source is None or output is None:
        raise UserError(f"`convert {name}` takes SOURCE and OUTPUT; '{name}' needs {get_converter(name).files}")
    options: dict[str, Any] = {"seed": seed, **parse_settings(settings)}
    if limit is not None:
        options["limit"] = limit
    if image_root is not None:
        options["image_root"] = str(image_root)
    with writing(output):
        manifest = run(
            name, source, output, options, preset=preset, workers=workers or usable_cores(), overwrite=overwrite,
            progress=not quiet,
        )  # fmt: skip
    typer.echo(summary(manifest.content))
    if manifest.rejected:
        with manifest.path.with_name("rejected.jsonl").open(encoding="utf-8") as file:
            row = json.loads(file.readline())
        typer.echo(f"see rejected.jsonl, which begins with {row['file']}, {row['position']}: {row['reason']}")
    typer.echo(f"manifest: {manifest.path}")
    if not manifest.complete:
        typer.echo("a raw file is damaged and could not be read to its end; see rejected.jsonl", err=True)
        raise typer.Exit(1)


def summary(content: dict[str, Any]) -> str:
    """A manifest as a few lines to read."""
    rows = [(entry["file"], entry["records"], entry["questions"]) for entry in content["outputs"]]
    width = max([len(row[0]) for row in rows] + [len("output")])
    lines = [f"{'output':<{width}}{'records':>12}{'questions':>12}"]
    lines += [f"{file:<{width}}{records:>12,}{questions:>12,}" for file, records, questions in rows]
    for title in ("rejected", "not_drawn", "notes"):
        lines += [f"{title.replace('_', ' ')}: {count:,} {kind}" for kind, count in content[title].items()]
    table = content["table_1"]
    if table is not None:
        verdict = "agrees" if table["agrees"] else "differs: is the raw data complete?"
        lines.append(
            f"Table 1 of the paper has {table['paper']:,} training records, here {table['written']:,}: {verdict}"
        )
    return "\n".join(lines)


def check_records(
    records: list[Path],
    image_root: Path | None = None,
    tokenizer: Path | None = None,
    max_length: int = 2048,
    batch_size: int = 128,
    epochs: float = 1.0,
) -> None:
    """Checks record files, prints the table, and leaves with exit code 1 if anything is wrong.

    For ``cotbal check`` when it is given record files instead of a configuration.
    """
    from trainer.data.checking import check_files

    result = check_files(records, image_root, tokenizer, max_length, batch_size, epochs)
    typer.echo(result.table())
    if result.problems:
        raise typer.Exit(1)


def add_commands(app: typer.Typer) -> None:
    """Adds ``convert`` to the command line."""
    app.command()(convert)
