"""``report.html``: one page, without scripts and without anything loaded from elsewhere, about one run.

The page is built from whatever the run directory holds, so it can be made at any time; what is not there yet is
said in its place. Numbers come from `trainer.report.tables`, figures from `trainer.report.plots`, sample
predictions from `trainer.report.samples`; this file puts them together.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import yaml
from markupsafe import Markup, escape

from trainer.balancing.registry import training_label
from trainer.config import BUILT_IN
from trainer.errors import UserError
from trainer.parsing import number
from trainer.report import plots
from trainer.report.balancing import score_matrix, variant, weights
from trainer.report.curves import loss_panels, weight_panels
from trainer.report.run_directory import RunDirectory, test_sets
from trainer.report.samples import sample_groups
from trainer.report.tables import (
    BASELINES,
    EQUAL,
    FINAL,
    SINGLE,
    ScoreTable,
    comparisons,
    delta_rows,
    format_value,
    headline,
    metric_label,
    read_scores,
    score_rows,
    scores_by_seed,
    seed_comparisons,
)
from trainer.units import duration

T = TypeVar("T")

# What the report is made of, in the order in which a run writes it, and what each file is for.
EXPECTED = {
    "config.yaml": "the configuration",
    "environment.json": "versions of the software",
    "tasks.json": "the tasks, once their records are checked",
    "scores.json": "validation scores of the proxies",
    "weights.json": "the task weights",
    "results.json": "test scores of the final models",
}


def build_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from what is in ``run_dir`` and return its path.

    Raises:
        UserError: there is no such directory, or nothing of a run is in it.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"there is no run directory {run_dir}")
    if not any((run_dir / name).exists() for name in (*EXPECTED, "trainings", "evaluations", "stages")):
        raise UserError(f"{run_dir} holds nothing of a run: none of {', '.join(EXPECTED)} is there")
    page = _template().render(report_context(RunDirectory(run_dir)))
    target = run_dir / "report.html"
    partial = target.with_suffix(".html.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(target)
    return target


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    return environment.get_template("report.html.j2")


def report_context(run: RunDirectory) -> dict[str, Any]:
    """Everything the template shows."""
    scores = read_scores(run)
    over_seeds = seed_comparisons(run)
    deltas, why_no_deltas = comparisons(run, over_seeds)
    rows = delta_rows(run, deltas, over_seeds)
    samples = {(task["name"], part): records for task in run.tasks for part, records in test_sets(task).items()}
    sampled = next((name for name in ("cotbal", "ew") if (run.path / "evaluations" / name / "test").is_dir()), None)
    balanced = _attempt(run, "weights.json", lambda: weights(run))
    context = {
        "title": run.path.resolve().name,
        "facts": _facts(run),
        "headline": headline(run, scores, deltas, over_seeds),
        "weight_sentence": balanced["sentence"] if balanced else None,
        "tiles": sorted(rows, key=lambda row: (row["method"] != FINAL, row["method"] != EQUAL))[:2],
        "columns": [{"name": name, "label": BASELINES.get(name, name)} for name in scores.values],
        "test_rows": score_rows(scores, samples),
        "test_complete": scores.complete,
        "deltas": rows,
        "seeds": max(map(len, scores_by_seed(run).values()), default=1),
        "why_no_deltas": why_no_deltas,
        "radar": _radar(scores),
        "weights": balanced,
        "variants": [
            row
            for name in run.variants
            if (row := _attempt(run, f"weights/{name}.json", functools.partial(variant, run, name)))
        ],
        "score_matrix": _attempt(run, "scores.json", lambda: score_matrix(run)),
        "curves": loss_panels(run),
        "trajectories": weight_panels(run),
        "sampled": training_label(sampled) if sampled else None,
        "sample_groups": [
            {**group, "value": _scored(scores, training_label(sampled), group)} for group in sample_groups(run, sampled)
        ]
        if sampled
        else [],
        "stages": _stages(run),
        "environment": _flatten(run.environment or {}),
        "config": run.config,
        "tasks": [{**task, "metric": metric_label(task.get("metric") or "–")} for task in run.tasks],
        "sources": _sources(run),
        "styles": Markup((Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")),
    }
    # Last: reading everything above is what fills these.
    context["absent"] = {name: what for name, what in EXPECTED.items() if name in run.missing}
    context["damaged"] = list(dict.fromkeys(run.damaged))
    return context


def _scored(scores: ScoreTable, method: str, group: Mapping[str, Any]) -> str:
    """The model's score on the set that a group of samples is of."""
    name = f"{group['part']} {group['metric']}".strip()
    return format_value(scores.values.get(method, {}).get((group["task"], name)), name)


def breakable(name: str) -> Markup:
    """A name that may break after "_", "-" and "/"."""
    return Markup(re.sub("([_/-])", r"\1<wbr>", str(escape(name))))


def _attempt(run: RunDirectory, name: str, make: Callable[[], T]) -> T | None:
    """A section from a file written by hand or by another version: said to be damaged instead of fatal."""
    try:
        return make()
    except (UserError, KeyError, TypeError, ValueError, IndexError) as error:
        run.damaged.append(f"{name}: {type(error).__name__}: {error}")
        return None


def _facts(run: RunDirectory) -> list[str]:
    balanced = sum(not task.get("auxiliary") for task in run.tasks)
    facts = []
    if run.tasks:
        auxiliary = len(run.tasks) - balanced
        facts.append(f"{balanced} tasks" + (f" + {auxiliary} auxiliary" if auxiliary else ""))
    environment = run.environment or {}
    if environment.get("device"):
        processes = environment.get("world_size")
        plural = "" if processes == 1 else "es"
        facts.append(f"{environment['device']}" + (f", {processes} process{plural} per training" if processes else ""))
    if run.stages:
        facts.append(f"started {_moment(run.stages[0].get('started'))}")
    return facts


def _radar(scores: ScoreTable) -> dict[str, Any] | None:
    """Fig. 2, and what has no place in it. Lower-is-better metrics enter as STL / method, several metrics of a task as
    their mean."""
    single = scores.values.get(SINGLE, {})
    methods = [name for name in (EQUAL, FINAL) if name in scores.values]
    usable = [
        key for key in scores.directions if single.get(key, 0) > 0 and all(key in scores.values[m] for m in methods)
    ]
    tasks = list(dict.fromkeys(task for task, _ in usable))
    if not methods or not tasks:
        return None
    unusable = [key for key in scores.directions if key not in usable]
    left_out = list(dict.fromkeys(f"{task} ({label})" if task in tasks else task for task, label in unusable))
    ratios: dict[str, list[float]] = {}
    for method in methods:
        ratios[method] = []
        for task in tasks:
            found = []
            for key in usable:
                if key[0] == task:
                    value = scores.values[method][key]
                    higher = scores.directions[key] == "higher"
                    found.append(value / single[key] if higher else single[key] / value if value else 0.0)
            ratios[method].append(sum(found) / len(found))
    if len(tasks) >= 3:
        figure = plots.radar(tasks, ratios)
    else:
        percent = {method: [100 * ratio for ratio in row] for method, row in ratios.items()}
        label = "Bar chart of scores relative to single-task models"
        figure = plots.grouped_bars(tasks, percent, plots.METHOD_COLORS, 100.0, "% of STL", label)
    return {"figure": Markup(figure), "left_out": left_out}


def _stages(run: RunDirectory) -> dict[str, Any]:
    rows = [
        {
            "stage": stage.get("stage", "?"),
            "status": stage.get("status", "?"),
            "started": _moment(stage.get("started")),
            "ended": _moment(stage.get("ended")),
            "seconds": number(stage.get("seconds")),
        }
        for stage in run.stages
    ]
    longest = max((row["seconds"] or 0.0 for row in rows), default=0.0)
    for row in rows:
        row["share"] = round(row["seconds"] / longest, 3) if row["seconds"] and longest else 0.0
        row["duration"] = "–" if row["seconds"] is None else duration(row["seconds"])
    return {"rows": rows, "total": duration(sum(row["seconds"] or 0.0 for row in rows))}


def _moment(started: Any) -> str:
    """A manifest's start, which may be an ISO string or seconds since the epoch."""
    if (seconds := number(started)) is not None:
        return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "minutes")
    return str(started or "–").replace("T", " ")[:16]


def _flatten(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def _sources(run: RunDirectory) -> list[dict[str, Any]]:
    """Where the tasks' material comes from: ``sources`` in tasks.json, or the built-in catalogue."""
    built_in: dict[str, Sequence[Any]] = {}
    try:
        config = yaml.safe_load(run.config or "")
    except yaml.YAMLError:
        config = None
    if isinstance(config, Mapping) and config.get("tasks") == BUILT_IN:
        from trainer.data.built_in.catalogue import BUILT_IN_TASKS

        built_in = {info.name: [vars(source) for source in info.sources] for info in BUILT_IN_TASKS}
    found: dict[str, dict[str, Any]] = {}
    for task in run.tasks:
        for source in task.get("sources") or built_in.get(task["name"], ()):
            entry = source if isinstance(source, Mapping) else {"name": str(source)}
            fields = {key: entry.get(key) for key in ("name", "author", "licence", "url")}
            row = found.setdefault(str(fields["name"]), {**fields, "tasks": []})
            row["tasks"].append(task["name"])
    return list(found.values())
