"""Tasks: the configured files read, their records in memory, and the order that task ids follow."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainer.config import TaskConfig
from trainer.data.pictures import open_image
from trainer.data.records import Record, RecordError, scan_records
from trainer.errors import SHOWN, UserError, each, first

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
        UserError: every problem of :func:`scan_task`.
    """
    task, problems = scan_task(config)
    refuse(problems)
    return task


def scan_task(config: TaskConfig) -> tuple[Task, list[str]]:
    """A task with the records that can be used, and what is wrong with its files.

    That is a file that is missing or has no records, a malformed record, named by file and position, and a record to
    score that has not one question; the first of each split by name.
    """
    splits: dict[str, list[Record]] = {}
    problems: list[str] = []
    for name in SPLITS:
        path = config.records_file(name)
        records: list[Record] = []
        wrong: list[str] = []
        if path is not None:
            try:
                records, wrong = scan_records(path)
            except RecordError as error:
                wrong = [str(error)]
            if not records and not wrong and not (config.auxiliary and name != "train"):
                wrong = [f"task '{config.name}': the {name} set {path} has no records"]
        if name != "train" and not config.auxiliary:
            wrong += [
                f"task '{config.name}', {name} record '{record.id}': scoring takes one question per record, got "
                f"{len(record.turns)} turns; split the conversation into one record per question"
                for record in records
                if len(record.turns) != 1
            ]
            records = [record for record in records if len(record.turns) == 1]
        splits[name] = records
        problems += first(wrong)
    return Task(config, **splits), problems


def refuse(problems: list[str]) -> None:
    """Raise if there are any.

    Raises:
        UserError: the problems, a line for each.
    """
    if problems:
        raise UserError("\n".join(problems))


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
        UserError: images that are missing, outside the image root, or do not decode, the first of them by name, each
            with its record.
    """
    root = task.config.image_root
    first_use: dict[str, str] = {}
    for split in SPLITS:
        for record in task.split(split):
            for image in record.images:
                first_use.setdefault(image, f"task '{task.name}', {split} record '{record.id}'")

    def check(found: tuple[str, str | None]) -> None:
        use, problem = found
        if problem is not None:
            raise UserError(f"{use}: {problem}")

    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        problems = pool.map(partial(image_problem, root), first_use)
        each(check, zip(first_use.values(), problems, strict=True), shown=SHOWN)
    return len(first_use)
