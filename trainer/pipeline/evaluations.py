"""How the pipeline scores its models: V_j on validation records, the results on test records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.bars import watched
from trainer.config import RunConfig, TaskConfig
from trainer.data.encoding import ConversationEncoder
from trainer.data.records import Record
from trainer.errors import SHOWN, each
from trainer.evaluation.generation import encode
from trainer.evaluation.spec import EvaluationSet, EvaluationSpec
from trainer.launching import rank_devices, threads_per_process


def evaluation_set(task: TaskConfig, split: str) -> EvaluationSet:
    """The records of ``validation`` or ``test`` as they are scored."""
    path = task.records_file(split)
    assert path is not None
    assert task.metric is not None
    label = task.title(split)
    return EvaluationSet(task.name, (path,), task.image_root, (task.metric,), task.max_new_tokens, label=label)


def check_scoring(task: TaskConfig, split: str, records: Sequence[Record], encoder: ConversationEncoder) -> None:
    """Encodes records as the evaluation of the split will: prompts, or whole conversations for perplexity.

    Args:
        records: those of the split, or some of them.
        encoder: one that opens no image (:func:`trainer.data.lengths.token_counter`) makes this cheap.

    Raises:
        UserError: the first records that cannot be scored, and how many there are.
    """
    chosen = evaluation_set(task, split)

    def check(record: Record) -> None:  # keeps nothing: encoded, a large split would fill the memory
        encode(encoder, chosen, [record])

    each(check, watched(records, f"{task.name} {split}", "record"), shown=SHOWN)


def evaluation_spec(
    config: RunConfig,
    model_path: Path,
    split: str,
    tasks: tuple[str, ...],
    output_dir: Path,
    *,
    features: Path | None,
    device: str,
    place: int,
) -> EvaluationSpec:
    """The evaluation of a trained model on a split of some tasks.

    Args:
        config: the run's resolved configuration, with its tasks spelled out.
        split: ``validation`` or ``test``.
        place: among those of a machine; the i-th takes the i-th group of GPUs.
    """
    assert not isinstance(config.tasks, str), "the pipeline spells the tasks out"
    ranks = config.launch.processes
    return EvaluationSpec(
        model_path=model_path,
        sets=tuple(evaluation_set(task, split) for task in config.tasks if task.name in tasks),
        output_dir=output_dir,
        batch_size=config.evaluation.batch_size,
        precision=config.training.precision,
        devices=rank_devices(device, ranks, first=place * ranks),
        threads=threads_per_process(config.launch),
        attention=config.model.attention,
        max_length=config.model.max_length,
        features=features,
        images=config.model.images,
        by_task=True,
        overwrite=True,  # a stage that started with other inputs starts again
    )
