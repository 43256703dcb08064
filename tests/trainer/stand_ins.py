"""Whole runs in which trainings are replaced by what they leave behind, and evaluations by scores that follow from the
training's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trainer.nodes.machine as machine
from trainer.config import parse_config
from trainer.data.records import write_jsonl
from trainer.evaluation.spec import EvaluationSpec
from trainer.files import write_json
from trainer.launching import TrainingFailedError
from trainer.pipeline.algorithm1 import Pipeline
from trainer.pipeline.progress import Progress
from trainer.training import TrainingSpec

BALANCED = ["colour", "box"]


def score(training: str, task: str) -> float:
    """A score in percent that is another one for every training and task, with more data scoring higher."""
    data = 20.0 if training in ("mini", f"alone-{task}") else 50.0
    return data + sum(ord(letter) * (k + 1) for k, letter in enumerate(training + task)) % 97 / 10


def answers(training: str, task: str) -> list[bool]:
    """Which of four answers are right: other ones for every training and task, whatever the score above."""
    number = sum(map(ord, training + task))
    return [bool(number >> place & 1) for place in range(4)]


class Quiet(Progress):
    def say(self, text: str) -> None: ...


class Runs:
    """Stands in for trainings and evaluations from here on; counts trainings, and fails on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[str] = []
        self.fail_at: str | None = None
        self.samples = 4
        self.gains = True  # else every model scores as the mini one
        monkeypatch.setattr(machine, "run_training", self.train)
        monkeypatch.setattr(machine, "evaluate", self.evaluate)

    def train(self, spec_path: Path, *_: Any) -> None:
        spec = TrainingSpec.model_validate_json(spec_path.read_text())
        if spec.name == self.fail_at:
            raise TrainingFailedError(spec.name)
        self.trained.append(spec.name)
        (spec.output_dir / "model").mkdir()
        names = [*BALANCED, "chat"]
        with (spec.output_dir / "weights.csv").open("w") as file:
            file.write(",".join(["step", *names]) + "\n")
            for step in range(1, 5):
                moved = 0.1 * step if spec.method == "coba" else 0.0
                file.write(f"{step},{1 + moved},{1 - moved},1.0\n")
        entry = {name: {"loss": 1.0, "tokens": 5, "weight": 1.0} for name in names}
        lines = [json.dumps({"step": step, "steps": 4, "tasks": entry}) for step in range(1, 5)]
        (spec.output_dir / "log.jsonl").write_text("\n".join(lines))

    def evaluate(self, spec: EvaluationSpec, *_: Any) -> None:
        training = spec.model_path.parent.name
        metrics = {
            own.name: {
                "metric": "EM",
                "value": score(training if self.gains else "mini", own.name),
                "standard_error": 1.0,  # of another kind, as an older version may have left it
                "samples": self.samples,
            }
            for own in spec.sets
        }
        for own in spec.sets:
            predictions = ["a" if right else "b" for right in answers(training, own.name)[: self.samples]]
            write_jsonl(spec.predictions(own), [{"references": ["a"], "prediction": text} for text in predictions])
        write_json(spec.output_dir / "metrics.json", metrics)


def pipeline_on(run_data: dict[str, Any]) -> Callable[..., Path]:
    """Runs the pipeline with changes to the configuration; returns the run directory."""

    def go(overwrite: bool = False, **changes: Any) -> Path:
        run_data["tasks"][1]["metric"] = "exact_match"
        data = run_data | changes
        Pipeline(parse_config(data, "test"), Quiet()).run(overwrite)
        return Path(data["output_dir"])

    return go


def read(path: Path) -> Any:
    return json.loads(path.read_text())
