"""Where a run keeps things, and small facts about it."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer.config import RunConfig
from trainer.pipeline.trainings import Training

RESOLVED = "config.yaml"  # the configuration of the run, with all defaults and absolute paths
PLAN = "plan.json"  # names of the stages that the run has now; what earlier configurations left may lie beside it
BASE_MODEL = "base_model.json"  # the commit of a hub's model that all trainings start from
_LONGEST_LINE = 2**18  # bytes of log.jsonl; a task takes some 150


@dataclass(frozen=True)
class Places:
    """Paths inside a run directory."""

    run_dir: Path

    def training(self, training: Training) -> Path:
        return self.run_dir / "trainings" / training.name

    def evaluation(self, training: Training, split: str) -> Path:
        return self.run_dir / "evaluations" / training.name / split

    def weights(self, name: str) -> Path:
        """Weights of CoTBal or of one of its ablations."""
        return self.run_dir / "weights.json" if name == "cotbal" else self.run_dir / "weights" / f"{name}.json"


def weights_stage(name: str) -> str:
    """The stage that computes the weights `name`."""
    return "weights" if name == "cotbal" else f"weights-{name}"


def environment(config: RunConfig, device: str) -> dict[str, Any]:
    """Versions and sizes for ``environment.json``."""
    packages = ("torch", "transformers", "deepspeed", "accelerate", "cotbal")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "world_size": config.launch.ranks,
        "parallel": config.launch.slots,
    }


def last_step(log: Path) -> tuple[int, int]:
    """Steps done and steps in all, from a training's ``log.jsonl``; 0 of 0 while nothing is known."""
    try:
        with log.open("rb") as file:  # asked for twice a second, and it grows
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_LINE))
            line = json.loads(file.read().splitlines()[-1])
    except (FileNotFoundError, IndexError, json.JSONDecodeError):
        return 0, 0
    return line["step"], line["steps"]
