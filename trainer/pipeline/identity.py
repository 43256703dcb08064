"""What the outputs of a stage depend on, and nothing else: a finished training is kept until one of these changes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.balancing.registry import method_class
from trainer.config import BUILT_IN, RunConfig
from trainer.evaluation.manifest import model_digest
from trainer.pipeline.trainings import Training
from trainer.task_config import TaskConfig

# Raised whenever a change of the code makes finished stages of older runs worthless.
FORMAT = 5


class Identity:
    """Inputs of the stages of one configuration, as JSON. Record files and the model's are read once.

    Args:
        config: of the run.
        tasks: in the run's order.
        on_disk: whether the tasks' files exist before the run; else the stage that writes them stands for them.
    """

    def __init__(self, config: RunConfig, tasks: Sequence[TaskConfig], on_disk: bool) -> None:
        self.config, self.tasks, self.on_disk = config, tasks, on_disk
        self._digests: dict[Path, str] = {}

    @cached_property
    def model(self) -> dict[str, Any]:
        """How the model is used and, where it is a folder, what is in it: a copy elsewhere is the same model."""
        options = self.config.model
        used = options.model_dump(mode="json", exclude={"path"} if options.path == BUILT_IN else {"path", "tiny_llava"})
        folder = Path(options.path)
        used["images"] = options.images.changes()
        return used | {"files": model_digest(folder) if (folder / "config.json").is_file() else options.path}

    def records(self, *splits: str, of: Sequence[str] | None = None) -> list[Any] | None:
        """Name, weighting, images and content of every task's (or of the named tasks') files."""
        if not self.on_disk:
            return None
        return [
            {"name": task.name, "auxiliary": task.auxiliary, "image_root": str(task.image_root)}
            | {split: self._digests_of(task, split) for split in splits}
            for task in self.tasks
            if of is None or task.name in of
        ]

    def features(self) -> dict[str, Any]:
        """Of the built-in model's image features, beside the model."""
        images = self.config.model.images.changes()
        return {"format": FORMAT, "records": self.records("train", "validation", "test"), "model.images": images}

    def check(self) -> dict[str, Any]:
        """Of the verdict on the records, which costs little: everything about the tasks."""
        return {
            "format": FORMAT,
            "tasks": [task.model_dump(mode="json") for task in self.tasks] if self.on_disk else None,
            "records": self.records("train", "validation", "test"),
            "model": self.model,
            "training": self.config.training.model_dump(
                mode="json", include={"packing", "overlong", "learning_rates", "report_to"}
            ),
        }

    def validation(self) -> dict[str, Any]:
        """Of the verdict on validation records that are trained on."""
        return {"format": FORMAT, "records": self.records("validation"), "model": self.model}

    def training(self, training: Training, own_records: bool = True) -> dict[str, Any]:
        """Of a training, ``own_records`` off when another stage stands for what it sees."""
        ratio, kind = self.config.cotbal.mini_ratio, training.mixture.kind
        method = method_class(training.method)
        validates = method.needs.validation
        seen = [task.name for task in self.tasks if training.mixture.share(task.name, ratio) > 0]
        inputs: dict[str, Any] = {
            "format": FORMAT,
            "mixture": [kind, training.mixture.task],
            "cotbal.mini_ratio": None if kind in ("all", "single") else ratio,
            "records": self.records("train", *(["validation"] if validates else []), of=seen) if own_records else None,
            "training": self.config.training.fingerprint(),
            "model": self.model,
            "processes of a training": self.config.launch.ranks,
            "seed": self.config.seed + training.repetition,
            "method": training.method,
            "options": training.options,
        }
        return inputs | ({"balancing.validation": self.config.balancing.validation.model_dump()} if validates else {})

    def scoring(self, training: Training, split: str) -> dict[str, Any]:
        """Of an evaluation, beside the model that it scores.

        Not ``evaluation.batch_size``, which turns near ties at most: out of memory, a run is to go on with a smaller
        one and what it has.
        """
        limits = [
            {"name": task.name, "metric": _metrics(task, split), "max_new_tokens": task.max_new_tokens}
            for task in self.tasks
            if task.name in training.tasks
        ]
        records = self.records(split, of=training.tasks)
        return {"format": FORMAT, "tasks": limits, "records": records}

    def results(self) -> dict[str, Any]:
        """Of the table of results beside the evaluations: baselines that read the records."""
        metrics = {task.name: _metrics(task, "test") for task in self.tasks}
        records = self.records("train", "test")
        return {"format": FORMAT, "columns": "errors of images", "metrics": metrics, "records": records}

    def _digests_of(self, task: TaskConfig, split: str) -> str | dict[str, str] | None:
        """Of a split's file, or of its named ones."""
        files = task.record_files(split)
        for path in files.values():
            if path not in self._digests:
                self._digests[path] = digest(path)
        found = {part: self._digests[path] for part, path in files.items()}
        return found.get("", found or None)


def _metrics(task: TaskConfig, split: str) -> str | None:
    """The metrics of a split in one text."""
    return ", ".join(task.scored_with(split)) or None


def digest(path: Path) -> str:
    """Content hash of a record file; a missing one is the check stage's to report."""
    if not path.is_file():
        return "missing"
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            whole.update(piece)
    return whole.hexdigest()[:16]
