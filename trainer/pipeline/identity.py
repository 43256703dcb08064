"""What the outputs of a stage depend on, and nothing else: a finished training is kept until one of these changes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.balancing.registry import method_class
from trainer.config import BUILT_IN, RunConfig, TaskConfig
from trainer.evaluation.manifest import model_digest
from trainer.pipeline.trainings import Training

# Raised whenever a change of the code makes finished stages of older runs worthless.
FORMAT = 3


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
            [task.name, task.auxiliary, str(task.image_root), *(self._digest(getattr(task, split)) for split in splits)]
            for task in self.tasks
            if of is None or task.name in of
        ]

    def features(self) -> list[Any]:
        """Of the built-in model's image features, beside the model."""
        return [FORMAT, self.records("train", "validation", "test"), self.config.model.images.changes()]

    def check(self) -> list[Any]:
        """Of the verdict on the records, which costs little: everything about the tasks."""
        training = self.config.training
        tasks = [task.model_dump(mode="json") for task in self.tasks] if self.on_disk else None
        rules = [training.packing, training.overlong, training.learning_rates, training.report_to]
        return [FORMAT, tasks, self.records("train", "validation", "test"), self.model, rules]

    def training(self, training: Training, own_records: bool = True) -> dict[str, Any]:
        """Of a training, ``own_records`` off when another stage stands for what it sees."""
        ratio, kind = self.config.cotbal.mini_ratio, training.mixture.kind
        method = method_class(training.method)
        validates = method.needs.validation
        seen = [task.name for task in self.tasks if training.mixture.share(task.name, ratio) > 0]
        inputs: dict[str, Any] = {
            "format": FORMAT,
            "mixture": [kind, training.mixture.task, None if kind in ("all", "single") else ratio],
            "records": self.records("train", *(["validation"] if validates else []), of=seen) if own_records else None,
            "training": self.config.training.fingerprint(),
            "model": self.model,
            "processes": self.config.launch.ranks,
            "seed": self.config.seed + training.repetition,
            "balancing": [training.method, training.options],
        }
        return inputs | ({"validation": self.config.balancing.validation.model_dump()} if validates else {})

    def scoring(self, training: Training, split: str) -> list[Any]:
        """Of an evaluation, beside the model that it scores."""
        limits = {task.name: [task.metric, task.max_new_tokens] for task in self.tasks if task.name in training.tasks}
        return [FORMAT, limits, self.records(split, of=training.tasks)]

    def results(self) -> list[Any]:
        """Of the table of results beside the evaluations: baselines that read the records."""
        metrics = {task.name: task.metric for task in self.tasks}
        return [FORMAT, metrics, self.records("train", "test")]

    def _digest(self, path: Path | None) -> str | None:
        if path is not None and path not in self._digests:
            self._digests[path] = digest(path)
        return None if path is None else self._digests[path]


def digest(path: Path) -> str:
    """Content hash of a record file; a missing one is the check stage's to report."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else "missing"
