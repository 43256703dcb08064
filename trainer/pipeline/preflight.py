"""Checks before anything expensive: records, images, supervised tokens, the model's options. No training is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotbal_kernels.huggingface import apply_fused_loss
from trainer.balancing.registry import method_class
from trainer.bars import watched
from trainer.config import BUILT_IN, RunConfig
from trainer.data.ahead import accepted, check_shared_memory, spare_processes, tried
from trainer.data.chat import ChatTemplate
from trainer.data.encoding import ConversationEncoder
from trainer.data.lengths import SampleLength, image_values, sample_length, token_counter
from trainer.data.oddities import oddities
from trainer.data.records import Record
from trainer.errors import SHOWN, UserError, each, first, one_of
from trainer.evaluation.scoring import check_references
from trainer.evaluation.spec import EvaluationSet
from trainer.files import write_json
from trainer.launching import resolve_device
from trainer.loop.learning_rates import own_rates
from trainer.loop.tracking import check_trackers
from trainer.metrics import AccuracyIoU, get_metric
from trainer.models.hub import model_folder
from trainer.models.images import refuse_cropped_boxes
from trainer.models.loading import (
    embedded_tokens,
    empty_model,
    load_config,
    load_processor,
    model_class,
    positions,
    refuse_attention,
    table_of_positions,
)
from trainer.models.lora import check_lora
from trainer.models.packable import refuse_unpackable
from trainer.models.weights import check_weights
from trainer.pipeline.evaluations import check_scoring, evaluation_sets
from trainer.pipeline.planned_data import spread
from trainer.pipeline.trainings import list_trainings
from trainer.task_config import TaskConfig
from trainer.tasks import SPLITS, RecordFiles, Task, TaskImages, check_images, load_tasks, refuse, scan_task

if TYPE_CHECKING:
    from trainer.pipeline.stages import StageContext

_IMAGES_MEASURED = 200  # records of a task whose images' sizes are read
_BYTES_OF_TOKEN = 4 * 8  # ids, labels, mask or positions, task id
_BYTES_OF_VALUE = 4  # processors make float32
_COUNTS = "{:>9}{:>9}{:>9}{:>24}{:>14}{:>9}"  # of the table: a million records and images of each split


def describe(task: Task) -> dict[str, Any]:
    """What ``tasks.json`` and the report say of a task."""
    named = {part: len(records) for part, records in task.test_sets.items() if part}
    several = {"test_sets": named, "test_metrics": task.config.test_metrics}
    return {
        "name": task.name,
        "metric": task.config.metric,
        "auxiliary": task.config.auxiliary,
        **{f"{split}_records": len(task.split(split)) for split in SPLITS},
        **{key: value for key, value in several.items() if value},
        "image_root": str(task.config.image_root),
        "description": task.config.description,
    }


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
    """Encodes every record of a split as a training does and counts its tokens.

    Raises:
        UserError: records whose images do not fit, that have no supervised token, or that are too long where
            ``training.overlong`` refuses that, the first of them by name; or none is left.
    """
    title, records = task.config.title(split), task.split(split)

    def measure(index: int) -> SampleLength:
        try:
            return sample_length(encoder, records[index], task.image_path, overlong)
        except UserError as error:
            raise UserError(f"{title}: {error}") from error

    measured = tried(measure, range(len(records)), spare_processes())
    lengths = each(accepted, watched(measured, f"{task.name} {split}", "record", len(records)), shown=SHOWN)
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
    """Checks that the model can be trained as configured, from its config.json and what its weights are called.

    Raises:
        UserError: it cannot have the loss of Eq. 2, or not the attention that is asked for; ``max_length`` is more than
            its positions; it cannot be packed although ``training.packing`` is on; ``freeze``, LoRA or
            ``training.learning_rates`` names nothing in it, or nothing is left to train; the weights of a folder are
            not there, damaged, or another model's.
    """
    found = load_config(model_path)
    refuse_attention(found, config.model)
    if config.training.packing:
        refuse_unpackable(model_path)
    model = empty_model(found, config.model)
    if config.model.lora is not None:
        trained = check_lora(model, config.model)
    else:
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise UserError("nothing would be trained: model.freeze and model.lora leave no parameter; take an entry out")
    own_rates(trained, config.training.learning_rates)
    try:
        apply_fused_loss(model)
    except ValueError as error:
        raise UserError(f"model.path '{model_path}': it cannot be trained with task weights: {error}") from error
    most = positions(found)
    if most is not None and config.model.max_length > most:  # a table ends there, other models are lost
        raise UserError(
            f"model.max_length = {config.model.max_length} is more than the {most} positions that '{model_path}' "
            "was made for (max_position_embeddings of its config.json); lower it"
        )
    if Path(model_path).is_dir():  # a hub's are downloaded when all else is right
        check_weights(Path(model_path), found, model_class(found))


@dataclass(frozen=True)
class CheckedTask:
    """A task without problems: its images, its training tokens where a tokenizer is at hand, what is odd, and bytes of
    a training batch, roughly."""

    task: Task
    images: TaskImages
    count: TokenCount | None
    warnings: list[str]
    batch: float


def check_task(
    config: RunConfig, task_config: TaskConfig, encoder: ConversationEncoder | None, files: RecordFiles
) -> CheckedTask:
    """Checks a task's records: its files, its images, and every sample as trainings and evaluations will encode it.

    Args:
        encoder: counts tokens; None leaves them alone.
        files: of the run.

    Raises:
        UserError: every problem, a line each.
    """
    # What can be used is checked further, whatever is wrong with the rest.
    task, problems = scan_task(task_config, files=files)
    checks: list[Callable[[], Any]] = [partial(refuse, problems), partial(check_images, task)]
    if encoder is not None:
        checks.append(partial(check_tokens, task, encoder, "train", config.training.overlong))
    if not task_config.auxiliary:
        for split in ("validation", "test"):
            checks += [
                partial(_check_answers, own, task.sets(split)[own.part]) for own in evaluation_sets(task_config, split)
            ]
    if encoder is not None and not task_config.auxiliary:
        if _answers_boxes(task_config) and config.model.images.aspect_ratio is None:
            images_of = (image for split in SPLITS for record in task.split(split) for image in record.images)
            paths = map(task.image_path, images_of)
            checks.append(partial(refuse_cropped_boxes, encoder.processor, paths, f"task '{task.name}'"))
        for split in ("validation", "test"):
            scored = evaluation_sets(task_config, split)
            checks += [partial(check_scoring, own, split, task.sets(split)[own.part], encoder) for own in scored]
        if _validates(config):
            checks.append(partial(check_tokens, task, encoder, "validation", config.training.overlong))
    _, images, *found = each(lambda check: check(), checks)
    chat = encoder.chat if encoder is not None else None
    odd = [
        warning
        for split in SPLITS
        for part, records in task.sets(split).items()
        for warning in _odd(records, chat, partial(task_config.record_title, split, part))
    ]
    counts = [result for result in found if isinstance(result, TokenCount)]
    lost = [sentence for result in found if isinstance(result, list) for sentence in result]
    warnings = odd + first(lost) + _repeated(task) + _trained_on(task) + first(images.warnings)
    count = counts[0] if counts else None
    batch = batch_bytes(config, task, encoder, count) if encoder is not None and count is not None else 0.0
    return CheckedTask(task, images, count, warnings, batch)


def batch_bytes(config: RunConfig, task: Task, encoder: ConversationEncoder, count: TokenCount) -> float:
    """What a process hands over for a micro-batch of the task's mean training sample, with the images of some."""
    looked_at = spread(task.train, _IMAGES_MEASURED)
    values = sum(image_values(encoder, record, task.image_path) for record in looked_at) / len(looked_at)
    tokens = count.tokens / (len(task.train) - count.dropped)
    samples = config.training.batch_size * (config.model.max_length / tokens if config.training.packing else 1)
    return samples * (_BYTES_OF_TOKEN * tokens + _BYTES_OF_VALUE * values)


def _odd(records: Sequence[Record], chat: ChatTemplate | None, title: Callable[[str], str]) -> list[str]:
    """A sentence about the first record of each kind of oddity, and how many are like it: files may be full of them."""
    told: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for record in records:
        for kind, sentence in oddities(record, chat).items():
            told.setdefault(kind, f"{title(record.id)}: {sentence}")
            counts[kind] += 1
    return [one_of(sentence, counts[kind]) for kind, sentence in told.items()]


def _repeated(task: Task) -> list[str]:
    """A sentence about training records that are there more than once: published files have them, and so count them."""
    count = len(task.train) - len(set(task.train))
    if not count:
        return []
    title = task.config.title("train")
    return [f"{title}: {count:,} of {len(task.train):,} records are the same in everything as an earlier one"]


def _trained_on(task: Task) -> list[str]:
    """Sentences about scored records that are in the training set: what is remembered would count as learnt."""
    if task.config.auxiliary:
        return []
    # Of the training records, which may be ten times as many with as many turns each, only what is scored is kept.
    scored = {(record.images, record.turns[-1]) for split in ("validation", "test") for record in task.split(split)}
    trained = {own for record in task.train for turn in record.turns if (own := (record.images, turn)) in scored}
    found = []
    for split in ("validation", "test"):
        for part, records in task.sets(split).items():
            count = sum((record.images, record.turns[-1]) in trained for record in records)
            if count:
                title = task.config.title(split, part)
                found.append(f"{title}: {count:,} of {len(records):,} records are trained on, with the same answer")
    return found


def _check_answers(scored: EvaluationSet, records: Sequence[Record]) -> list[str]:
    return check_references(scored.metrics, {f"record '{own.id}'": own.answers for own in records}, scored.title)


def _answers_boxes(task: TaskConfig) -> bool:
    metrics = {*task.scored_with("validation"), *task.scored_with("test")}
    return any(isinstance(get_metric(metric), AccuracyIoU) for metric in metrics)


def _token_counter(config: RunConfig, model_path: str) -> ConversationEncoder:
    processor = load_processor(model_path, config.model.images)
    found = load_config(model_path)
    return token_counter(processor, config.model.max_length, table_of_positions(found), embedded_tokens(found))


def _validates(config: RunConfig) -> bool:
    """Whether a method of the run takes losses of validation records."""
    assert not isinstance(config.tasks, str)
    trainings = list_trainings(config, config.tasks)
    return any(method_class(training.method).needs.validation for training in trainings)


def check_all(
    config: RunConfig, model_path: str | None, after: Callable[[int, int], None] = lambda done, total: None
) -> list[CheckedTask]:
    """Checks the model and every task of a run.

    Args:
        model_path: None when the run has yet to make the model.
        after: called after every check without problems, with its number and how many there are.

    Raises:
        UserError: everything that is wrong, a line each.
    """
    assert not isinstance(config.tasks, str)
    encoder = _token_counter(config, model_path) if model_path else None
    files = RecordFiles(config.tasks)
    checks: list[Callable[[], CheckedTask | None]] = [
        partial(check_task, config, task, encoder, files) for task in config.tasks
    ]
    checks.insert(0, partial(check_trackers, config.training.report_to))
    if model_path:
        checks.insert(0, partial(check_model, config, model_path))

    def check(number: int) -> CheckedTask | None:
        found = checks[number]()
        after(number + 1, len(checks))
        return found

    launch = config.launch
    workers = config.training.workers(resolve_device(launch.device)) * launch.processes * launch.parallel
    try:
        checked = [found for found in each(check, range(len(checks))) if found is not None]
        check_shared_memory(workers, max(one.batch for one in checked))
        return checked
    except UserError as error:
        problems = str(error).split("\n")
        raise UserError("\n  ".join(["the run cannot start:", *problems] if len(problems) > 1 else problems)) from error


def check_run(config: RunConfig, model_path: str, tasks_json: Path, context: StageContext) -> None:
    """Checks every task of a run, says what is odd about it, has the model on this machine, and writes ``tasks.json``.

    Raises:
        UserError: everything that is wrong, a line each.
    """
    described = []
    for checked in check_all(config, model_path, lambda done, total: context.report(done, total, "check")):
        for warning in checked.warnings:
            context.progress.say(f"warning: {warning}")
        row = describe(checked.task) | {"images": checked.images.count}
        count = checked.count
        assert count is not None
        row |= {"supervised_tokens": count.supervised, "tokens": count.tokens, "truncated_records": count.cut}
        row["dropped_records"] = count.dropped
        described.append(row)
    if not Path(model_path).is_dir():
        context.progress.say(f"weights of {model_path}: downloaded, if they are not on this machine")
        found = load_config(model_path)
        check_weights(model_folder(model_path, weights=True), found, model_class(found))
    write_json(tasks_json, {"tasks": described})


def check_validation(config: RunConfig, model_path: str, context: StageContext) -> None:
    """Checks that validation records can be trained on, for the methods that take losses of them.

    :func:`check_run` did so for the methods of its day; a method added to the configuration later needs it still.

    Raises:
        UserError: the first task's records that cannot, named.
    """
    assert not isinstance(config.tasks, str)
    encoder = _token_counter(config, model_path)
    balanced = [task for task in config.tasks if not task.auxiliary]
    for number, task in enumerate(load_tasks(balanced, ("validation",))):
        check_tokens(task, encoder, "validation", config.training.overlong)
        context.report(number + 1, len(balanced), "task")


def check_config(config: RunConfig) -> str:
    """The checks of a run without running it (``cotbal check``); returns a table for a person, and warnings.

    The built-in tasks and model are made by the run itself, so there is nothing of them to check yet.

    Raises:
        UserError: everything that is wrong, a line each.
    """
    resolve_device(config.launch.device)
    if isinstance(config.tasks, str):
        return "tasks: built_in (written and checked by the run itself)"
    drops = config.training.overlong == "drop"
    head = ("train", "valid.", "test", "images", "supervised", "dropped" if drops else "cut")
    lines = [f"{'task':<24}{'metric':<16}" + _COUNTS.format(*head)]
    warnings: list[str] = []
    for checked in check_all(config, None if config.model.path == BUILT_IN else config.model.path):
        task, count = checked.task, checked.count
        supervised, overlong = (count.supervised, count.dropped if drops else count.cut) if count else ("-", "-")
        images = "/".join(str(checked.images.by_split[split]) for split in SPLITS)
        counts = (len(task.train), len(task.validation), len(task.test), images, supervised, overlong)
        lines.append(f"{task.name:<24}{task.config.metric or 'auxiliary':<16}" + _COUNTS.format(*counts))
        warnings += [f"warning: {warning}" for warning in checked.warnings]
    return "\n".join(lines + warnings)
