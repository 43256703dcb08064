"""Tasks: the configured files read, their records in memory, and the order that task ids follow."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainer.config import TaskConfig
from trainer.data.pictures import open_image
from trainer.data.records import Record, RecordError, read_records
from trainer.errors import UserError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """A task and its records. Task id k of the loss is the position in the run's list of tasks."""

    config: TaskConfig
    train: list[Record]
    validation: list[Record]
    test: list[Record]

    @property
    def name(self) -> str:
        return self.config.name

    def split(self, name: str) -> list[Record]:
        """The records of ``train``, ``validation`` or ``test``."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    def image_path(self, image: str) -> Path:
        return self.config.image_root / image


def load_task(config: TaskConfig) -> Task:
    """Reads a task's record files.

    Raises:
        RecordError: a malformed record, named by file and position.
        UserError: a split that is configured but empty, or a question to score without an answer.
    """
    splits: dict[str, list[Record]] = {}
    for name, path in zip(SPLITS, (config.train, config.validation, config.test), strict=True):
        records = read_records(path) if path is not None else []
        if path is not None and not records and not (config.auxiliary and name != "train"):
            raise UserError(f"task '{config.name}': the {name} set {path} has no records")
        splits[name] = records
    for name in ("validation", "test"):
        for record in splits[name]:
            if not config.auxiliary and len(record.turns) != 1:
                raise RecordError(
                    f"task '{config.name}', {name} record '{record.id}': scoring takes one question per record, "
                    f"got {len(record.turns)} turns; split the conversation into one record per question"
                )
    return Task(config, **splits)


def image_problem(root: Path, image: str) -> str | None:
    """Why training cannot use an image below `root`, found by decoding it; None if it can."""
    path = root / image
    if not path.is_relative_to(root) or ".." in Path(image).parts:  # links inside the root may lead anywhere
        return f"image {path} is outside the task's image_root {root}"
    try:
        if not path.is_file():
            return f"image {path} does not exist"
        open_image(path)
    except Exception as error:  # Pillow's plugins raise whatever broken content makes them stumble over
        return f"image {path} cannot be decoded: {error}"
    return None


def check_images(task: Task) -> int:
    """Decodes every image the task's records name, once each; returns how many there are.

    Raises:
        UserError: an image that is missing, outside the image root, or does not decode, named with its record.
    """
    root = task.config.image_root
    first_use: dict[str, str] = {}
    for split in SPLITS:
        for record in task.split(split):
            for image in record.images:
                first_use.setdefault(image, f"task '{task.name}', {split} record '{record.id}'")

    def check(item: tuple[str, str]) -> None:
        problem = image_problem(root, item[0])
        if problem is not None:
            raise UserError(f"{item[1]}: {problem}")

    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        for _ in pool.map(check, first_use.items()):
            pass
    return len(first_use)
