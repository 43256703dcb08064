"""Reads a run directory for the report. A file that is absent or damaged is noted, never fatal."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.evaluation.spec import set_key
from trainer.pipeline.places import PLAN, weights_stage

# One logged optimizer step, as the trainer writes it.
Step = dict[str, Any]


class RunDirectory:
    """The files of one run. ``missing`` collects what is not there yet, ``damaged`` what cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.missing: list[str] = []
        self.damaged: list[str] = []

    @cached_property
    def tasks(self) -> list[dict[str, Any]]:
        table = self._json("tasks.json")
        entries = table.get("tasks", []) if isinstance(table, Mapping) else []
        return [
            {"metric": None, "auxiliary": False, "description": None, **entry, "name": str(entry["name"])}
            for entry in entries
            if isinstance(entry, Mapping) and "name" in entry
        ]

    @cached_property
    def scores(self) -> dict[str, Any] | None:
        return self._object("scores.json")

    @cached_property
    def weights(self) -> dict[str, Any] | None:
        return self._object("weights.json")

    @cached_property
    def variants(self) -> dict[str, dict[str, Any]]:
        """Weights of CoTBal's variants among the comparisons, by name."""
        names = sorted(file.stem for file in (self.path / "weights").glob("*.json"))
        planned = [name for name in names if self._plan is None or weights_stage(name) in self._plan]
        return {name: table for name in planned if (table := self._object(f"weights/{name}.json")) is not None}

    @cached_property
    def results(self) -> dict[str, Any] | None:
        return self._object("results.json")

    @cached_property
    def environment(self) -> dict[str, Any] | None:
        return self._object("environment.json")

    @cached_property
    def config(self) -> str | None:
        return self._text("config.yaml")

    @cached_property
    def _plan(self) -> list[str] | None:
        """Stages of the run as it is configured now; None where it does not say, and everything counts."""
        plan = self._json(PLAN) if (self.path / PLAN).exists() else None
        return [str(name) for name in plan] if isinstance(plan, list) else None

    @cached_property
    def stages(self) -> list[dict[str, Any]]:
        """Stage manifests in the order in which they started, without what earlier configurations left."""
        manifests = [
            manifest
            for file in sorted((self.path / "stages").glob("*.json"))
            if (self._plan is None or file.stem in self._plan)
            and isinstance(manifest := self._json(f"stages/{file.name}"), dict)
        ]
        return sorted(manifests, key=lambda manifest: str(manifest.get("started", "")))

    @cached_property
    def trainings(self) -> list[str]:
        names = sorted(file.parent.name for file in (self.path / "trainings").glob("*/log.jsonl"))
        return [name for name in names if self._plan is None or f"train-{name}" in self._plan]

    def log(self, training: str) -> list[Step]:
        """Logged steps in order; a resumed training logs some steps twice and the later line counts."""
        steps: dict[int, Step] = {}
        for line in self._lines(f"trainings/{training}/log.jsonl"):
            if isinstance(line.get("step"), int):
                steps[line["step"]] = line
        return [steps[step] for step in sorted(steps)]

    def weights_of(self, training: str) -> tuple[list[str], list[list[float]]]:
        """``weights.csv`` of a training: tasks, and rows of the step and every task's weight; both may be empty."""
        name = f"trainings/{training}/weights.csv"
        file = self.path / name
        if not file.exists():
            return [], []
        header, *lines = [*csv.reader(file.read_text(encoding="utf-8", errors="replace").splitlines())] or [[]]
        rows = []
        for line in lines:
            try:
                row = [float(value) for value in line]
            except ValueError:
                row = []
            if len(row) == len(header) and all(map(math.isfinite, row)):
                rows.append(row)
        if len(rows) < len(lines):
            self.damaged.append(f"{name}: {len(lines) - len(rows)} unreadable line(s) left out")
        return header[1:], rows

    def metrics(self, training: str, split: str) -> dict[str, Any]:
        """{score: {"metric", "value", "standard_error", "samples"}}, empty when not evaluated yet."""
        name = f"evaluations/{training}/{split}/metrics.json"
        table = self._object(name) if (self.path / name).exists() else None
        return {key: entry for key, entry in (table or {}).items() if isinstance(entry, Mapping)}

    def predictions(self, training: str, split: str, task: str, part: str = "") -> list[dict[str, Any]]:
        return self._lines(f"evaluations/{training}/{split}/{set_key(task, part)}.jsonl")

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """JSON lines; the last one may be cut off where a process was killed."""
        file = self.path / name
        if not file.exists():
            return []
        lines, bad = [], 0
        # Not `str.splitlines`: an answer may hold a separator that JSON leaves as it is (U+2028, U+0085).
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                bad += 1
                continue
            if isinstance(value, dict):
                lines.append(value)
        if bad:
            self.damaged.append(f"{name}: {bad} unreadable line{'s' * (bad > 1)} left out")
        return lines

    def _object(self, name: str) -> dict[str, Any] | None:
        value = self._json(name)
        if value is not None and not isinstance(value, dict):
            self.damaged.append(f"{name}: an object was expected, got {type(value).__name__}")
            return None
        return value

    def _json(self, name: str) -> Any:
        text = self._text(name)
        if text is None:
            return None
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            self.damaged.append(f"{name}: {error}")
            return None

    def _text(self, name: str) -> str | None:
        file = self.path / name
        if not file.exists():
            self.missing.append(name)
            return None
        return file.read_text(encoding="utf-8", errors="replace")


def test_sets(task: Mapping[str, Any]) -> dict[str, Any]:
    """Records of a task's test sets by name; a set without one has the empty one."""
    named = task.get("test_sets")
    return dict(named) if isinstance(named, Mapping) and named else {"": task.get("test_records")}
