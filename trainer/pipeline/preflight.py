"""Checks before anything expensive: records, images, metrics, supervised tokens. One clear error, no training lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import BUILT_IN, RunConfig, TaskConfig
from trainer.data.encoding import ConversationEncoder, TooLongError
from trainer.data.lengths import SampleLength, sample_length, token_counter
from trainer.errors import UserError
from trainer.launching import resolve_device
from trainer.models.loading import load_processor
from trainer.models.lora import check_lora
from trainer.models.packable import refuse_unpackable
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


@dataclass(frozen=True)
class TokenCount:
    """What a split comes to: tokens that are trained on, and records that are cut or left out."""

    supervised: int = 0
    tokens: int = 0
    cut: int = 0
    dropped: int = 0


def check_tokens(
    task: Task, encoder: ConversationEncoder, split: str = "train", overlong: str = "truncate"
) -> TokenCount:
    """Encodes every record of a split and counts its tokens.

    Raises:
        UserError: a record whose images do not fit, that has no supervised token, or that is too long where
            ``training.overlong`` refuses that, named with its task; or none is left.
    """
    lengths: list[SampleLength] = []
    refused: list[UserError] = []
    for record in task.split(split):
        try:
            lengths.append(sample_length(encoder, record, task.image_path, overlong))
        except UserError as error:
            if overlong != "refuse" or not isinstance(error, TooLongError):
                raise UserError(f"task '{task.name}': {error}") from error
            refused.append(error)
    if refused:  # counted to the end, so that one look says how much there is to do
        count = f"; {len(refused)} of {len(task.split(split))} {split} records are" if len(refused) > 1 else ""
        raise UserError(f"task '{task.name}': {refused[0]}{count}") from refused[0]
    if lengths and all(length.dropped for length in lengths):
        raise UserError(
            f"task '{task.name}': every {split} record is longer than model.max_length = {encoder.max_length} "
            "tokens, and training.overlong drops such records; raise max_length, or choose 'truncate'"
        )
    return TokenCount(
        sum(length.supervised for length in lengths),
        sum(length.tokens for length in lengths),
        sum(length.cut for length in lengths),
        sum(length.dropped for length in lengths),
    )


def check_model(config: RunConfig, model_path: str) -> None:
    """Checks that the model can be trained as configured.

    Raises:
        UserError: it cannot be packed although ``training.packing`` is on, or LoRA finds nothing to adapt.
    """
    if config.training.packing:
        refuse_unpackable(model_path)
    if config.model.lora is not None:
        check_lora(model_path, config.model)


def check_run(config: RunConfig, model_path: str, tasks_json: Path, context: StageContext) -> None:
    """Checks every task of a run and writes ``tasks.json``.

    Raises:
        UserError: the first thing that is wrong, named.
    """
    assert not isinstance(config.tasks, str)
    encoder = token_counter(load_processor(model_path), config.model.max_length)
    check_model(config, model_path)
    described = []
    for number, task_config in enumerate(config.tasks):
        task, images = check_records(task_config)
        row = describe(task) | {"images": images}
        count = check_tokens(task, encoder, "train", config.training.overlong)
        row |= {"supervised_tokens": count.supervised, "tokens": count.tokens, "truncated_records": count.cut}
        row["dropped_records"] = count.dropped
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
        check_tokens(load_task(task_config), encoder, "validation", config.training.overlong)
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
        check_model(config, config.model.path)
    drops = config.training.overlong == "drop"
    lines = [
        f"{'task':<24}{'metric':<14}{'train':>8}{'valid.':>8}{'test':>8}{'images':>8}{'supervised':>12}"
        f"{'dropped' if drops else 'cut':>{8 if drops else 6}}"
    ]
    for task_config in config.tasks:
        task, images = check_records(task_config)
        count = check_tokens(task, encoder, "train", config.training.overlong) if encoder else None
        supervised, overlong = (count.supervised, count.dropped if drops else count.cut) if count else ("-", "-")
        lines.append(
            f"{task.name:<24}{task_config.metric or 'auxiliary':<14}{len(task.train):>8}{len(task.validation):>8}"
            f"{len(task.test):>8}{images:>8}{supervised:>12}{overlong:>{8 if drops else 6}}"
        )
    return "\n".join(lines)
