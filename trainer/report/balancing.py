"""What the report says of Eq. 3-11: contributions, difficulties, weights, and the validation scores behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from trainer.balancing.registry import training_label
from trainer.balancing.scores import Scores
from trainer.parsing import number
from trainer.report import plots
from trainer.report.run_directory import RunDirectory
from trainer.report.tables import format_value, metric_label

STRATEGIES = {
    "lambda_one2all": ("λ one2all (Eq. 5)", "green"),
    "lambda_all2one": ("λ all2one (Eq. 7)", "gold"),
    "lambda_c": ("λ C (Eq. 8)", "violet"),
    "lambda_d": ("λ D (Eq. 10)", "orange"),
    "weights": ("λ CoTBal (Eq. 11)", "blue"),
}
APPLIED = {  # what a strategy trains with
    "one2all": "lambda_one2all",
    "all2one": "lambda_all2one",
    "contribution": "lambda_c",
    "difficulty": "lambda_d",
    "cotbal": "weights",
}


def weights(run: RunDirectory) -> dict[str, Any] | None:
    """Contribution heatmap, difficulties and the weights of every strategy."""
    table = run.weights
    if table is None:
        return None
    tasks = [str(task) for task in table["tasks"]]
    contribution = [[float(value) for value in row] for row in table["contribution"]]
    off_diagonal = [abs(v) for i, row in enumerate(contribution) for j, v in enumerate(row) if i != j]
    # An own contribution is 1 by definition, so 1 is the least that full colour stands for.
    largest = max([1.0, *off_diagonal])
    changed = table.get("clipped") or []
    clipped = [entry.get("tasks") for entry in changed if entry.get("quantity") == "contribution"]
    bounded = [task for entry in changed if entry.get("quantity") == "difficulty" for task in entry["tasks"]]
    errors = table.get("sampling_errors") or {}
    noise = errors.get("contribution")
    heatmap = [
        {
            "task": task,
            "cells": [
                {
                    "value": f"{value:.2f}",
                    "error": f"{noise[i][j]:.2f}" if noise and i != j else None,
                    "own": i == j,
                    "clipped": [task, tasks[j]] in clipped,
                    "tone": "negative" if value < 0 else "positive",
                    "strength": round(abs(value) / largest, 3),
                }
                for j, value in enumerate(row)
            ],
        }
        for i, (task, row) in enumerate(zip(tasks, contribution, strict=True))
    ]
    applied = [float(value) for value in table.get("applied") or table["weights"]]
    high, low = max(range(len(tasks)), key=applied.__getitem__), min(range(len(tasks)), key=applied.__getitem__)
    strategy = table.get("strategy", "cotbal")
    used, spreads = APPLIED[strategy], errors.get("applied")

    def told(task: int) -> str:
        return f"{tasks[task]} ({applied[task]:.2f}{f' ± {spreads[task]:.2f}' if spreads else ''})"

    caution = f" {len(changed)} of the contributions and difficulties behind them were bounded." if changed else ""
    named = "CoTBal" if strategy == "cotbal" else f"CoTBal ({strategy} strategy)"
    if len(tasks) == 1:
        sentence = f"There is one balanced task, {tasks[0]}, so its weight is {applied[0]:.2f}."
    elif applied[high] == applied[low]:
        sentence = f"{named} gives all tasks the same weight."
    else:
        sentence = (
            f"{named} gives the most weight to {told(high)} and the least to {told(low)}; equal weighting is 1 for "
            f"every task{', and ± what other validation samples would change' if spreads else ''}."
        )
    strategies = {key: label for key, (label, _) in STRATEGIES.items()}
    directions = (run.scores or {}).get("higher_is_better") or {}
    lower = [task for task in tasks if directions.get(task) is False]
    return {
        "tasks": tasks,
        "heatmap": heatmap,
        "difficulty": Markup(plots.difficulty_bars(tasks, table["difficulty"], lower, bounded)),
        "lower": lower,
        "bounded": bounded,
        "bars": Markup(
            plots.grouped_bars(
                tasks,
                {label: table[key] for key, label in strategies.items()},
                dict(STRATEGIES.values()),
                1.0,
                "task weight λ",
                "Task weights by strategy",
            )
        ),
        "rows": [
            {"label": strategies[key], "cells": _with_errors(table[key], spreads if key == used else None)}
            for key in STRATEGIES
        ],
        "difficulties": _with_errors(table["difficulty"], errors.get("difficulty")),
        "errors": bool(errors),
        "temperature": table["temperature"],
        "alpha": table["alpha"],
        "strategy": strategy,
        "warnings": table.get("warnings") or [],
        "clipped": changed,
        "sentence": sentence + caution,
    }


def _with_errors(values: Sequence[float], errors: Sequence[float] | None) -> list[tuple[str, str | None]]:
    return [(f"{value:.3f}", f"{errors[k]:.3f}" if errors else None) for k, value in enumerate(values)]


def variant(run: RunDirectory, name: str) -> dict[str, Any]:
    """A variant's temperature, alpha and strategy, and by task the weight it trained with and its difficulty."""
    table = run.variants[name]
    each = zip(table["tasks"], table["applied"], table["difficulty"], strict=True)
    return {
        "label": training_label(name),
        **{key: table[key] for key in ("temperature", "alpha", "strategy")},
        "cells": {task: {"weight": f"{weight:.3f}", "difficulty": f"{D:.3f}"} for task, weight, D in each},
    }


def score_matrix(run: RunDirectory) -> dict[str, Any] | None:
    """V_j(mini) and V_j(i+mini), with standard errors where the evaluations are at hand."""
    if run.scores is None:
        return None
    scores = Scores.from_json(run.scores)
    labels = [metric_label(next((t.get("metric") for t in run.tasks if t["name"] == n), "")) for n in scores.tasks]
    rows = [("mini", "mini", scores.mini)]
    rows += [(f"{task} + mini", f"plus-{task}", scores.full[i]) for i, task in enumerate(scores.tasks)]
    columns = [[row[2][j] for row in rows] for j in range(len(scores.tasks))]
    matrix = []
    for position, (name, training, values) in enumerate(rows):
        evaluated = run.metrics(training, "validation")
        cells = []
        for j, task in enumerate(scores.tasks):
            low, high = min(columns[j]), max(columns[j])
            error = number(evaluated.get(task, {}).get("standard_error"))
            cells.append(
                {
                    "value": format_value(float(values[j]), labels[j]),
                    "error": format_value(error, labels[j]) if error is not None else None,
                    "strength": round(float((values[j] - low) / (high - low)), 3) if high > low else 0.0,
                    "own": position == j + 1,
                }
            )
        matrix.append({"name": name, "cells": cells})
    headers = [{"task": task, "metric": label} for task, label in zip(scores.tasks, labels, strict=True)]
    return {"headers": headers, "rows": matrix}
