"""How the pipeline scores its models: V_j on validation records, the results on test records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import LaunchConfig, RunConfig, TaskConfig
from trainer.data.encoding import ConversationEncoder
from trainer.data.records import Record
from trainer.errors import each
from trainer.evaluation import EvaluationSet, EvaluationSpec, RankProcesses, evaluate
from trainer.evaluation.generation import encode
from trainer.launching import rank_devices, threads_per_process

if TYPE_CHECKING:
    from trainer.pipeline.stages import StageContext

SHOWN = 10  # records of a split that errors name; the rest is counted


class Evaluators:
    """The processes that evaluate: a group of ``launch.processes`` ranks for each of ``launch.parallel`` places."""

    def __init__(self, launch: LaunchConfig, device: str) -> None:
        self._groups = [RankProcesses(launch.processes) for _ in range(launch.parallel)]
        self._device = device

    def run(self, spec: EvaluationSpec, context: StageContext) -> None:
        """Evaluates in the ranks of the stage's place, and gives their GPU memory back to the trainings."""
        group = self._groups[context.slot]
        try:
            evaluate(spec, group, lambda meter: context.report(meter.done, meter.total, "sample", meter.rates()))
        finally:
            if self._device != "cpu":
                group.close()

    def close(self) -> None:
        for group in self._groups:
            group.close()


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

    each(check, records, shown=SHOWN)


def evaluation_spec(
    config: RunConfig,
    model_path: Path,
    split: str,
    tasks: tuple[str, ...],
    output_dir: Path,
    *,
    features: Path | None,
    device: str,
    slot: int,
) -> EvaluationSpec:
    """The evaluation of a trained model on a split of some tasks.

    Args:
        config: the run's resolved configuration, with its tasks spelled out.
        split: ``validation`` or ``test``.
        slot: place among the parallel stages; slot i takes the i-th group of GPUs.
    """
    assert not isinstance(config.tasks, str), "the pipeline spells the tasks out"
    ranks = config.launch.processes
    return EvaluationSpec(
        model_path=model_path,
        sets=tuple(evaluation_set(task, split) for task in config.tasks if task.name in tasks),
        output_dir=output_dir,
        batch_size=config.evaluation.batch_size,
        precision=config.training.precision,
        devices=rank_devices(device, ranks, first=slot * ranks),
        threads=threads_per_process(config.launch),
        attention=config.model.attention,
        max_length=config.model.max_length,
        features=features,
        by_task=True,
        overwrite=True,  # a stage that started with other inputs starts again
    )
