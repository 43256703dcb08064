"""How the pipeline scores its models: V_j on validation records, the results on test records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.bars import watched
from trainer.config import RunConfig
from trainer.data.ahead import accepted, spare_processes, tried
from trainer.data.encoding import ConversationEncoder
from trainer.data.records import Record
from trainer.errors import SHOWN, each
from trainer.evaluation.generation import encode
from trainer.evaluation.spec import EvaluationSet, EvaluationSpec
from trainer.launching import rank_devices, threads_per_process
from trainer.task_config import TaskConfig


def evaluation_sets(task: TaskConfig, split: str) -> list[EvaluationSet]:
    """The records of ``validation`` or ``test`` as they are scored."""
    metrics = task.scored_with(split)
    return [
        EvaluationSet(
            task.name,
            (path,),
            task.image_root,
            metrics,
            task.max_new_tokens,
            label=task.title(split, part),
            part=part,
            task=task.name,
        )
        for part, path in task.record_files(split).items()
    ]


def check_scoring(chosen: EvaluationSet, split: str, records: Sequence[Record], encoder: ConversationEncoder) -> None:
    """Encodes records as the evaluation of the set will: prompts, or whole conversations for perplexity.

    Args:
        split: of the set.
        records: those of the set, or some of them.
        encoder: one that opens no image (:func:`trainer.data.lengths.token_counter`) makes this cheap.

    Raises:
        UserError: the first records that cannot be scored, and how many there are.
    """

    def check(index: int) -> None:  # keeps nothing: encoded, a large split would fill the memory
        encode(encoder, chosen, [records[index]])

    checked = tried(check, range(len(records)), spare_processes())
    each(accepted, watched(checked, f"{chosen.key} {split}", "record", len(records)), shown=SHOWN)


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
        sets=tuple(own for task in config.tasks if task.name in tasks for own in evaluation_sets(task, split)),
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
