"""How the pipeline scores its models: V_j on validation records, the results on test records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import LaunchConfig, RunConfig
from trainer.evaluation import EvaluationSet, EvaluationSpec, RankProcesses, evaluate
from trainer.launching import rank_devices, threads_per_process

if TYPE_CHECKING:
    from trainer.pipeline.stages import StageContext


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
    sets = []
    for task in config.tasks:
        path = {"validation": task.validation, "test": task.test}[split]
        if task.name in tasks:
            assert path is not None
            assert task.metric is not None
            sets.append(EvaluationSet(task.name, (path,), task.image_root, (task.metric,), task.max_new_tokens))
    ranks = config.launch.processes
    return EvaluationSpec(
        model_path=model_path,
        sets=tuple(sets),
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
