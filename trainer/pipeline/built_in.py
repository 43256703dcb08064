"""Stages that make the built-in tasks, the built-in model and its cached image features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import RunConfig
from trainer.data.built_in import BUILT_IN_TASKS, Sizes, write_built_in_tasks, write_pretraining
from trainer.data.built_in.catalogue import Split
from trainer.data.built_in.drawing import SIDE
from trainer.data.records import IMAGE_PLACEHOLDER
from trainer.task_config import BuiltInTasksConfig, TaskConfig
from trainer.tasks import SPLITS, load_task

if TYPE_CHECKING:
    from trainer.pipeline.stages import StageContext

# Longest answers of the built-in tasks in tokens, with room to spare: generation stops there.
_MAX_NEW_TOKENS = {"scene_captions": 40, "region_captions": 20, "grounding": 24}


def built_in_sizes(options: BuiltInTasksConfig) -> Sizes:
    """The configured sizes; chat is as large as its material allows, at most half a task."""
    chat = min(options.train // 2, 600)
    return Sizes(
        train=options.train,
        validation=options.validation,
        test=options.test,
        chat_train=chat,
        chat_validation=2,
        chat_test=2,
    )


def task_configs(directory: Path, options: BuiltInTasksConfig) -> list[TaskConfig]:
    """The built-in tasks as a user would configure tasks of their own."""
    return [
        TaskConfig(
            name=info.name,
            train=directory / info.name / "train.jsonl",
            validation=None if info.auxiliary else directory / info.name / "validation.jsonl",
            test=None if info.auxiliary else directory / info.name / "test.jsonl",
            image_root=directory,
            metric=info.metric.lower() if info.metric else None,
            auxiliary=info.auxiliary,
            max_new_tokens=_MAX_NEW_TOKENS.get(info.name, 16),
            description=f"{info.description} (analogue of {info.analogue})",
        )
        for info in BUILT_IN_TASKS
    ]


def planned_records(options: BuiltInTasksConfig, tasks: list[TaskConfig], split: Split = "train") -> dict[str, int]:
    """Records of every built-in task, which are still to be written."""
    sizes = built_in_sizes(options)
    return {task.name: sizes.of(task.name, split) for task in tasks}


def write_data(directory: Path, options: BuiltInTasksConfig, seed: int, context: StageContext) -> None:
    """Writes the built-in tasks' records and images."""
    write_built_in_tasks(
        directory,
        seed=seed,
        sizes=built_in_sizes(options),
        progress=lambda task, done, total: context.report(done, total, "record"),
    )


def pretraining_task(directory: Path) -> TaskConfig:
    """The image descriptions that the built-in model is pretrained on, as a task of their own."""
    return TaskConfig(
        name="pretraining", train=directory / "pretraining" / "train.jsonl", image_root=directory, auxiliary=True
    )


def write_corpus(directory: Path, records: int, seed: int, context: StageContext) -> None:
    """Writes the image descriptions of :func:`pretraining_task`."""
    write_pretraining(
        directory,
        seed=seed,
        count=records,
        progress=lambda task, done, total: context.report(done, total, "record"),
    )


def write_initial_model(directory: Path, config: RunConfig, tasks: list[TaskConfig]) -> None:
    """Writes the built-in LLaVA with random weights and a tokenizer made from the training text of `tasks`."""
    from trainer.models.tiny_llava import write_tiny_llava

    texts = [
        " " + text.replace(IMAGE_PLACEHOLDER, "").strip()
        for task in tasks
        for record in load_task(task, ("train",)).train
        for turn in record.turns
        for text in (turn.question, turn.answer)
    ]
    write_tiny_llava(
        directory,
        texts,
        config.model.tiny_llava,
        image_size=SIDE,
        max_length=config.model.max_length,
        seed=config.seed,
    )


def write_image_features(
    directory: Path, model_path: Path, config: RunConfig, tasks: list[TaskConfig], context: StageContext
) -> None:
    """Runs the frozen vision tower once over every image of `tasks`."""
    import torch

    from trainer.launching import resolve_device, usable_cores
    from trainer.models.features import write_features
    from trainer.models.loading import load_model, load_processor, vision_tower

    images: dict[Path, None] = {}
    for task in map(load_task, tasks):
        for split in SPLITS:
            images |= {task.image_path(image): None for record in task.split(split) for image in record.images}
    device = resolve_device(config.launch.device)
    torch.set_num_threads(1)
    tower = vision_tower(load_model(str(model_path), config.model, torch.float32))
    assert tower is not None, "the built-in model's tower is frozen and takes features"
    write_features(
        directory,
        list(images),
        tower.to(device),
        load_processor(str(model_path), config.model.images).image_processor,
        workers=usable_cores() if device == "cpu" else 1,
        progress=lambda done: context.report(done, len(images), "image"),
    )
