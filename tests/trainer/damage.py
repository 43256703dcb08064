"""A copy of the tasks' data for a test to damage, and the run on it, which ends where a training would start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class TrainingStarted(Exception):
    """Raised where a training process would be started."""


def run_on_copy(run_data: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The run's configuration on the copy, where starting a training process raises `TrainingStarted`."""

    def start(*arguments: Any, **options: Any) -> None:
        raise TrainingStarted

    monkeypatch.setattr("trainer.nodes.machine.run_training", start)
    for task in run_data["tasks"]:
        task["image_root"] = str(folder)
        for split in ("train", "validation", "test"):
            task[split] = str(folder / Path(task[split]).name)
    return run_data


def change_record(folder: Path, file: str, number: int, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / f"{file}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[number])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def longer(row: dict[str, Any]) -> None:
    row["conversations"][0]["value"] += 200 * " what"
