"""The configuration of a whole run on the tests' three tasks, as a mapping that a test may change."""

from pathlib import Path
from typing import Any

from trainer.task_config import TaskConfig


def small_run(tasks: list[TaskConfig], model: Path, output_dir: Path) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "tasks": [task.model_dump(mode="json") for task in tasks],
        "model": {"path": str(model), "max_length": 128},
        "training": {"batch_size": 4, "precision": "fp32", "zero_stage": 1},
        "cotbal": {"mini_ratio": 0.25},
        "launch": {"device": "cpu", "threads": 1},
    }
