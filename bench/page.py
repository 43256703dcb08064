"""The HTML page: tables of ``bench.report`` and figures of ``bench.plots``; no scripts, nothing loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from bench import plots, report
from bench.peers import OURS, all_peers
from bench.results import OK, Row, Run
from trainer.report import plots as trainer_plots

MOST_FLOORS = 6  # cases in one figure


def page(runs: Sequence[Run]) -> str:
    """All runs on one page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    styles = Path(trainer_plots.__file__).parent / "templates" / "report.css"
    return environment.get_template("bench.html.j2").render(
        styles=Markup(styles.read_text(encoding="utf-8")),
        runs=[_run(run, number) for number, run in enumerate(runs)],
        peers=report.legend(all_peers()),
        ours=OURS,
    )


def _run(run: Run, number: int) -> dict[str, Any]:
    suites = [
        {"title": title, "rows": [_row(row) for row in run.rows if row.suite == suite]}
        for suite, title in report.SUITES.items()
    ]
    return {
        "id": f"run-{number}",
        "title": f"{run.environment['device']}: preset {run.preset}",
        "facts": [fact.replace("`", "") for fact in report.facts(run)],
        "figures": _figures(run),
        "suites": [suite for suite in suites if suite["rows"]],
    }


def _figures(run: Run) -> list[dict[str, Any]]:
    figures: list[dict[str, Any]] = []

    def add(caption: str, svg: str, wide: bool = False) -> None:
        figures.append({"caption": caption, "svg": Markup(svg), "wide": wide})

    sweeps = plots.sweeps(run)
    if sweeps:
        times = {name: plots.times(rows) for name, rows in sweeps.items()}
        add(
            "Forward and backward: median time against M.",
            plots.against_size(times, "ms", "Time against M"),
            len(times) > 1,
        )
        memories = {name: plots.memories(rows) for name, rows in sweeps.items()}
        if any(memories.values()):
            shown = {name: lines for name, lines in memories.items() if lines}
            caption = "Peak memory beyond inputs and outputs against M; less than 1 MiB is drawn as 1."
            add(caption, plots.against_size(shown, "MiB", "Memory against M"), len(shown) > 1)
    rows = [
        row
        for row in run.rows
        if row.suite == "linear" and row.case["mode"] == "train" and not row.case["tasks"] and row.floor and row.entries
    ]
    if rows:
        add("The dashed line is the floor, timed in the same rounds.", plots.floors(rows[:MOST_FLOORS]))
    return figures


def _row(row: Row) -> dict[str, Any]:
    timed = sorted((entry for entry in row.entries if entry.seconds), key=lambda entry: entry.seconds[1])  # type: ignore[index]
    columns = report.row_columns(row)
    return {
        "label": row.label,
        "skipped": row.skipped,
        "columns": columns,
        "cells": [(entry.name == OURS, report.row_cells(entry, row, columns)) for entry in timed],
        "others": [(entry.name, report.reason(entry).replace("**", "")) for entry in row.entries if entry.status != OK],
        "disturbed": [(entry.name, report.retries(entry)) for entry in timed if entry.retried],
        "floor": f"bare products {report.milliseconds(row.products)} ms" if row.products else None,
    }
