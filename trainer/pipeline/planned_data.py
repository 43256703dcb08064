"""How many tokens a run would train on, before anything is prepared: exact for small data, from a sample for large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trainer.config import BUILT_IN, RunConfig
from trainer.data.lengths import image_values, sample_length, token_counter
from trainer.data.records import Record
from trainer.errors import UserError
from trainer.models.images import vision_input
from trainer.models.loading import load_config, load_processor
from trainer.pipeline.evaluations import check_scoring, evaluation_sets
from trainer.task_config import TaskConfig
from trainer.tasks import load_tasks

MEASURED = 2000  # records of a task that are tokenized; the others are given the lengths of these
_CHARACTERS_PER_TOKEN = 4.0  # where no tokenizer is at hand: English text under the usual vocabularies
_TOKENS_PER_TURN = 4  # marks of roles and ends that a chat template writes
_IMAGE_TOKENS = 576  # of an image where the model's configuration does not say: LLaVA-1.5's


@dataclass(frozen=True, slots=True)
class Planned:
    """One record as training would see it: tokens (0: dropped), supervised ones, numbers that make up its images."""

    tokens: int
    supervised: int
    pixels: int


@dataclass(frozen=True)
class PlannedData:
    """Every training record of every task, how it was counted, and validation records of every balanced task."""

    tasks: Mapping[str, Sequence[Planned]]
    source: str
    validation: Mapping[str, int]


def planned_data(config: RunConfig, tasks: Sequence[TaskConfig]) -> PlannedData:
    """Lengths of all training records of a run with tasks and a model of its own.

    Raises:
        UserError: a record file that cannot be read, or a record that cannot be used.
    """
    encoder, image_tokens, image_pixels = None, _IMAGE_TOKENS, 0
    if config.model.path != BUILT_IN:
        try:
            model = config.model
            processor = load_processor(model.path, model.images, local_only=True)
            encoder = token_counter(processor, model.max_length)
        except UserError:  # no processor here, or one without a chat template: then by the number of characters
            try:
                found = load_config(config.model.path, local_only=True)
                image_tokens = getattr(found, "image_seq_length", None) or _IMAGE_TOKENS
                image_pixels = vision_input(found).image
            except UserError:
                pass
    planned: dict[str, list[Planned]] = {}
    validation: dict[str, int] = {}
    sampled = False
    for task_config, task in zip(tasks, load_tasks(tasks), strict=True):
        records = task.train
        if not task_config.auxiliary:
            validation[task.name] = len(task.validation)
        chosen = spread(records, MEASURED)
        count = len(chosen)
        sampled |= count < len(records)
        measured = []
        for record in chosen:
            if encoder is None:
                rough = _by_characters(record, image_tokens, config.model.max_length, config.training.overlong)
                measured.append(replace(rough, pixels=image_pixels * len(record.images)))
                continue
            try:
                length = sample_length(encoder, record, task.image_path, config.training.overlong)
            except UserError as error:
                raise UserError(f"{task_config.title('train')}: {error}") from error
            measured.append(Planned(length.tokens, length.supervised, image_values(encoder, record, task.image_path)))
        for split in ("validation", "test"):
            for own in evaluation_sets(task_config, split):
                if encoder is not None and not task_config.auxiliary:
                    check_scoring(own, split, spread(task.sets(split)[own.part], MEASURED), encoder)
        planned[task.name] = [measured[index * count // len(records)] for index in range(len(records))]
    how = "counted with the model's tokenizer" if encoder else (
        f"estimated: {_CHARACTERS_PER_TOKEN:g} characters a token, {image_tokens} tokens an image (no tokenizer at "
        f"'{config.model.path}' on this machine)"
    )  # fmt: skip
    how += f", from {MEASURED:,} records of each larger task" if sampled else ""
    return PlannedData(planned, how, validation)


def spread(records: Sequence[Record], most: int) -> list[Record]:
    """At most so many records, evenly spread."""
    count = min(len(records), most)
    return [records[index * len(records) // count] for index in range(count)]


def _by_characters(record: Record, image_tokens: int, max_length: int, overlong: str) -> Planned:
    answers = sum(len(turn.answer) for turn in record.turns) / _CHARACTERS_PER_TOKEN + len(record.turns)
    questions = (len(record.system) + sum(len(turn.question) for turn in record.turns)) / _CHARACTERS_PER_TOKEN
    tokens = round(answers + questions) + 2 * _TOKENS_PER_TURN * len(record.turns) + image_tokens * len(record.images)
    if tokens > max_length and overlong == "drop":
        return Planned(0, 0, 0)
    return Planned(min(tokens, max_length), min(round(answers), max_length), 0)
