"""Checks before anything expensive: records, images, metrics, supervised tokens. One clear error, no training lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.config import BUILT_IN, RunConfig, TaskConfig
from trainer.data.encoding import ConversationEncoder
from trainer.errors import UserError
from trainer.launching import resolve_device
from trainer.models.loading import load_processor
from trainer.pipeline.stages import write_json
from trainer.tasks import SPLITS, Task, check_images, load_task

if TYPE_CHECKING:
    from trainer.pipeline.stages import StageContext


def describe(task: Task) -> dict[str, Any]:
    """What ``tasks.json`` and the report say of a task."""
    return {
        "name": task.name,
        "metric": task.config.metric,
        "auxiliary": task.config.auxiliary,
        **{f"{split}_records": len(task.split(split)) for split in SPLITS},
        "image_root": str(task.config.image_root),
        "description": task.config.description,
    }


def check_records(config: TaskConfig) -> tuple[Task, int]:
    """Reads a task and decodes its images; returns it with the number of images.

    Raises:
        UserError: the first thing that is wrong, named.
    """
    task = load_task(config)
    return task, check_images(task)


def check_tokens(task: Task, encoder: ConversationEncoder, split: str = "train") -> tuple[int, int, int]:
    """Encodes every record of a split; returns supervised tokens, all tokens and how many records were cut.

    Raises:
        UserError: a record whose images do not fit or that has no supervised token, named with its task.
    """
    supervised = total = cut = 0
    for record in task.split(split):
        try:
            encoded = encoder.training_sample(record, task.image_path)
        except UserError as error:
            raise UserError(f"task '{task.name}': {error}") from error
        supervised += encoded.supervised
        total += len(encoded.input_ids)
        cut += encoded.truncated
    return supervised, total, cut


class BlankImages:
    """Stands in for image features when only tokens are counted: every image has as many as a blank one.

    Models that cut an image into a number of tiles that depends on its size may need more for a large one.
    """

    def __init__(self, tokens: int) -> None:
        self._features_P0 = torch.empty(tokens, 0)

    def __getitem__(self, path: Path) -> Tensor:
        return self._features_P0

    def example(self) -> Tensor:
        return self._features_P0


def token_counter(processor: Any, max_length: int) -> ConversationEncoder:
    """An encoder that lays out tokens and labels without opening an image."""
    blank = ConversationEncoder(processor, max_length).blank_image()
    return ConversationEncoder(processor, max_length, BlankImages(len(blank.input_ids)))


def check_run(config: RunConfig, model_path: str, tasks_json: Path, context: StageContext) -> None:
    """Checks every task of a run and writes ``tasks.json``.

    Raises:
        UserError: the first thing that is wrong, named.
    """
    assert not isinstance(config.tasks, str)
    encoder = token_counter(load_processor(model_path), config.model.max_length)
    described = []
    for number, task_config in enumerate(config.tasks):
        task, images = check_records(task_config)
        row = describe(task) | {"images": images}
        supervised, total, cut = check_tokens(task, encoder)
        row |= {"supervised_tokens": supervised, "tokens": total, "truncated_records": cut}
        described.append(row)
        context.report(number + 1, len(config.tasks), "task")
    write_json(tasks_json, {"tasks": described})


def check_validation(config: RunConfig, model_path: str, context: StageContext) -> None:
    """Checks that validation records can be trained on, for the methods that take losses of them.

    Raises:
        UserError: the first record that cannot, named.
    """
    assert not isinstance(config.tasks, str)
    encoder = token_counter(load_processor(model_path), config.model.max_length)
    balanced = [task for task in config.tasks if not task.auxiliary]
    for number, task_config in enumerate(balanced):
        check_tokens(load_task(task_config), encoder, "validation")
        context.report(number + 1, len(balanced), "task")


def check_config(config: RunConfig) -> str:
    """The checks of a run without running it (``cotbal check``); returns a table for a person.

    The built-in tasks and model are made by the run itself, so there is nothing of them to check yet.

    Raises:
        UserError: the first thing that is wrong, named.
    """
    resolve_device(config.launch.device)
    if isinstance(config.tasks, str):
        return "tasks: built_in (written and checked by the run itself)"
    encoder = None
    if config.model.path != BUILT_IN:
        encoder = token_counter(load_processor(config.model.path), config.model.max_length)
    lines = [f"{'task':<24}{'metric':<14}{'train':>8}{'valid.':>8}{'test':>8}{'images':>8}{'supervised':>12}{'cut':>6}"]
    for task_config in config.tasks:
        task, images = check_records(task_config)
        supervised, _, cut = check_tokens(task, encoder) if encoder else ("-", 0, "-")
        lines.append(
            f"{task.name:<24}{task_config.metric or 'auxiliary':<14}{len(task.train):>8}{len(task.validation):>8}"
            f"{len(task.test):>8}{images:>8}{supervised:>12}{cut:>6}"
        )
    return "\n".join(lines)
