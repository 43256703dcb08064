"""Tasks: the configured files read, their records in memory, and the order that task ids follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainer.bars import watched
from trainer.data.pictures import oddity
from trainer.data.records import Record, RecordError, RecordFile, Records, read_file
from trainer.errors import SHOWN, UserError, each, first
from trainer.metrics import takes_losses
from trainer.task_config import TaskConfig, set_title

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """A task and its records. Task id k of the loss is the position in the run's list of tasks.

    Attributes:
        test_sets: records by the name of the set, which is empty for a file without one.
    """

    config: TaskConfig
    train: Records
    validation: Records
    test_sets: dict[str, Records]

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def test(self) -> list[Record]:
        """The records of all test sets."""
        return [record for records in self.test_sets.values() for record in records]

    def sets(self, split: str) -> dict[str, Records]:
        """The records of ``train``, ``validation`` or ``test`` by set."""
        return self.test_sets if split == "test" else {"": self.train if split == "train" else self.validation}

    def split(self, name: str) -> Sequence[Record]:
        """The records of ``train``, ``validation`` or ``test``."""
        return self.test if name == "test" else self.sets(name)[""]

    def image_path(self, image: str) -> Path:
        return self.config.image_root / image


class RecordFiles:
    """The record files of tasks that are loaded one after the other: what several of them share is read once."""

    def __init__(self, tasks: Sequence[TaskConfig], splits: Sequence[str] = SPLITS) -> None:
        uses = Counter(path for task in tasks for split in splits for path in task.record_files(split).values())
        self._shared = {path for path, count in uses.items() if count > 1}
        self._read: dict[Path, RecordFile] = {}

    def read(self, path: Path) -> RecordFile:
        """As :func:`read_file`."""
        if path in self._read:
            return self._read[path]
        file = read_file(path)
        if path in self._shared:
            self._read[path] = file
        return file


def load_tasks(configs: Sequence[TaskConfig], splits: Sequence[str] = SPLITS) -> Iterator[Task]:
    """Each task as :func:`load_task` reads it."""
    files = RecordFiles(configs, splits)
    return (load_task(config, splits, files) for config in configs)


def load_task(config: TaskConfig, splits: Sequence[str] = SPLITS, files: RecordFiles | None = None) -> Task:
    """Reads a task's record files, those of some splits or of all.

    Args:
        files: has read some of them already.

    Raises:
        UserError: every problem of :func:`scan_task`.
    """
    task, problems = scan_task(config, splits, files)
    refuse(problems)
    return task


def scan_task(
    config: TaskConfig, wanted: Sequence[str] = SPLITS, files: RecordFiles | None = None
) -> tuple[Task, list[str]]:
    """A task with the records that can be used, and what is wrong with its files.

    That is a file that is missing or has no records, a malformed record, named by file and position, and a record to
    score that has not one question, unless it is scored by losses alone; the first of each file by name.

    Args:
        wanted: splits to read; the task has no records of the others.
        files: has read some of its files already.
    """
    files = files or RecordFiles([config], wanted)
    splits: dict[str, dict[str, Records]] = {split: {} for split in SPLITS}
    problems: list[str] = []
    named = [(split, part, path) for split in wanted for part, path in config.record_files(split).items()]
    for split, part, path in named:
        records = Records()
        try:
            records, wrong = files.read(path).of_task(config.name, unique_ids=split != "train")
        except RecordError as error:
            wrong = [str(error)]
        if not records and not wrong and not (config.auxiliary and split != "train"):
            wrong = [f"task '{config.name}': the {set_title(split, part)} {path} has no records"]
        if split != "train" and not config.auxiliary and not all(map(takes_losses, config.scored_with(split))):
            several = [record for record in records if len(record.turns) != 1]
            wrong += [
                f"{config.record_title(split, part, record.id)}: scoring takes one question per record, got "
                f"{len(record.turns)} turns; split the conversation into one record per question, or "
                "score perplexity, which takes every answer"
                for record in several
            ]
            if several:
                records = Records(record for record in records if len(record.turns) == 1)
        splits[split][part] = records
        problems += first(wrong)
    train, validation = (splits[split].get("", Records()) for split in ("train", "validation"))
    return Task(config, train, validation, splits["test"]), problems


def refuse(problems: list[str]) -> None:
    """Raise if there are any.

    Raises:
        UserError: the problems, a line for each.
    """
    if problems:
        raise UserError("\n".join(problems))


@dataclass(frozen=True)
class ImageLook:
    """Why training cannot use an image, or else what it sees in it otherwise than a person would."""

    problem: str | None = None
    warning: str | None = None


def look_at_image(root: Path, image: str) -> ImageLook:
    """Decodes an image below `root`."""
    path = root / image
    if not path.is_relative_to(root) or ".." in Path(image).parts:  # links inside the root may lead anywhere
        return ImageLook(f"image {path} is outside the task's image_root {root}")
    try:
        if not path.is_file():
            return ImageLook(f"image {path} does not exist")
        odd = oddity(path)
    except Exception as error:  # Pillow's plugins raise whatever broken content makes them stumble over
        return ImageLook(f"image {path} cannot be decoded: {error}")
    return ImageLook(warning=f"image {path} {odd}" if odd else None)


@dataclass(frozen=True)
class TaskImages:
    """Images of a task: how many there are, how many of them each split has, and what is odd about them."""

    count: int
    by_split: dict[str, int]
    warnings: list[str]


def check_images(task: Task) -> TaskImages:
    """Decodes every image the task's records name, once each.

    Raises:
        UserError: images that are missing, outside the image root, or do not decode, the first of them by name, each
            with its record.
    """
    root = task.config.image_root
    first_use: dict[str, str] = {}
    by_split: dict[str, set[str]] = {}
    for split in SPLITS:
        for part, records in task.sets(split).items():
            for record in records:
                for image in record.images:
                    first_use.setdefault(image, task.config.record_title(split, part, record.id))
        by_split[split] = {image for record in task.split(split) for image in record.images}
    warnings = []
    if first_use and not by_split["train"]:
        warnings.append(f"task '{task.name}': validation or test records have images, training records have none")
    shared = by_split["train"] & (by_split["validation"] | by_split["test"])
    if shared:
        warnings.append(
            f"task '{task.name}': {len(shared):,} images of training records are in validation or test records too, "
            f"such as {min(shared)}: scores may be too good"
        )

    def check(found: tuple[str, ImageLook]) -> None:
        use, look = found
        if look.problem is not None:
            raise UserError(f"{use}: {look.problem}")
        if look.warning is not None:
            warnings.append(f"{use}: {look.warning}")

    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        looks = pool.map(partial(look_at_image, root), first_use)
        found = zip(first_use.values(), looks, strict=True)
        each(check, watched(found, task.name, "image", len(first_use)), shown=SHOWN)
    return TaskImages(len(first_use), {split: len(images) for split, images in by_split.items()}, warnings)
