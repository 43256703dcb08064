"""What moved during the final trainings: losses and weights of every task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from trainer.balancing.registry import METHODS, training_label
from trainer.parsing import number
from trainer.report import plots
from trainer.report.run_directory import RunDirectory
from trainer.report.tables import EQUAL, FINAL, SINGLE


def final_trainings(run: RunDirectory) -> list[str]:
    """Trainings of the comparison, first seeds only."""
    proxies = ("plus-", "alone-")
    return [
        name
        for name in run.trainings
        if name not in ("mini", "pretraining") and not name.startswith(proxies) and "@" not in name
    ]


def loss_panels(run: RunDirectory) -> Markup | None:
    """Training loss of every task in the final trainings, over the share of the training."""
    tasks = [task["name"] for task in run.tasks]
    panels: dict[str, dict[str, plots.Curve]] = {}
    for name in final_trainings(run):
        points: dict[str, list[tuple[float, float]]] = {}
        for step in run.log(name):
            total, entries = number(step.get("steps")), step.get("tasks")
            if not total or not isinstance(entries, Mapping):
                continue
            for task, entry in entries.items():
                loss = number(entry.get("loss")) if isinstance(entry, Mapping) and entry.get("tokens", 1) else None
                if loss is not None:
                    points.setdefault(task, []).append((100 * step["step"] / total, loss))
        for task, line in points.items():
            x, y = zip(*line, strict=True)
            panels.setdefault(task, {})[training_label(name)] = (x, y)
    if not panels:
        return None
    order = [task for task in tasks if task in panels] + sorted(set(panels) - set(tasks))
    methods = {SINGLE: 0, EQUAL: 1, FINAL: 3}
    return Markup(
        plots.loss_curves(
            {task: dict(sorted(panels[task].items(), key=lambda item: methods.get(item[0], 2))) for task in order}
        )
    )


def weight_panels(run: RunDirectory) -> dict[str, Any] | None:
    """Weights of the methods that move them, as curves and as a table of means and ranges; None without any.

    A method that should have moved them and did not, since the training ended in its warm-up, is named too.
    """
    auxiliary = {task["name"] for task in run.tasks if task.get("auxiliary")}
    panels: dict[str, dict[str, plots.Curve]] = {}
    rows: list[dict[str, Any]] = []
    still = []
    for name in final_trainings(run):
        tasks, table = run.weights_of(name)
        columns = {
            task: [row[k + 1] for row in table] for k, task in enumerate(tasks) if task not in auxiliary and table
        }
        if not any(min(values) < max(values) for values in columns.values()):
            if columns and name in METHODS and METHODS[name].moves:
                still.append(training_label(name))
            continue
        steps = [row[0] for row in table]
        panels[training_label(name)] = {task: (steps, values) for task, values in columns.items()}
        cells = {
            task: f"{sum(values) / len(values):.2f} ({min(values):.2f}–{max(values):.2f})"
            for task, values in columns.items()
        }
        rows.append({"method": training_label(name), "cells": cells})
    if not panels and not still:
        return None
    order = list(dict.fromkeys(task for panel in panels.values() for task in panel))
    figure = Markup(plots.weight_curves(panels)) if panels else None
    return {"figure": figure, "tasks": order, "rows": rows, "still": still}
