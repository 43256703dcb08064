"""Eq. 2 in TRL's ``SFTTrainer`` (1.8 to 1.16), which takes the loss from the model and computes one of its own.

    from cotbal_kernels.huggingface.trl import TaskWeightedSFTTrainer

    trainer = TaskWeightedSFTTrainer(task_weights=[1.3, 0.6], model=path, args=config, train_dataset=data)

Imports TRL, and is imported by nothing else here.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from trl import SFTTrainer

from .patching import apply_fused_loss, forward_package, unwrapped
from .trainer import TaskWeightedTrainerMixin

_TASKS = "loss_task_ids"


class TaskIdCollator:
    """A collator that knows no tasks, and its batches with ``loss_task_ids [B]`` of the rows, if they have any.

    Raises:
        ValueError: some rows of a batch have a task and others none.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator([{key: value for key, value in row.items() if key != _TASKS} for row in rows])
        tasks = [row.get(_TASKS) for row in rows]  # None in a part of concatenated data sets that had no such column
        given = [task for task in tasks if task is not None]
        if given and len(given) < len(tasks):
            raise ValueError(
                f"{len(tasks) - len(given)} of {len(tasks)} rows of a batch have no {_TASKS}: give every part of the "
                "data set that column before they are joined"
            )
        if given:  # without any, of one task; the loss says what is missing where there are more
            batch[_TASKS] = torch.tensor(given)
        return batch


class _SFTWithModelLoss(SFTTrainer):
    """TRL's preparation of data and models, with the model's own loss."""

    def __init__(self, *args: Any, task_weights: Tensor | Sequence[float] | None = None, **kwargs: Any) -> None:
        config = inspect.signature(SFTTrainer.__init__).bind_partial(self, *args, **kwargs).arguments.get("args")
        if config is not None:
            _check(config)
        super().__init__(*args, **kwargs)
        base = unwrapped(self.model)
        if forward_package(base) == "trl":  # it would leave the patched one out; accelerate's hooks stay
            vars(base).pop("forward", None)
        apply_fused_loss(self.model, task_weights)
        self.model_accepts_loss_kwargs = True
        self.data_collator: Any = TaskIdCollator(self.data_collator)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return Trainer.compute_loss(self, *args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        return Trainer.prediction_step(self, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        trainer: Any = self
        if _TASKS not in trainer._signature_columns:
            trainer._signature_columns = [*trainer._signature_columns, _TASKS]


class TaskWeightedSFTTrainer(TaskWeightedTrainerMixin, _SFTWithModelLoss):
    """``SFTTrainer`` with task weights: rows of the data set have an integer ``loss_task_ids`` beside their text.

    It patches the model by itself, after TRL has loaded it and put adapters on it. TRL's ``mean_token_accuracy`` and
    ``entropy``, which need logits, are not logged; ``task_loss/NAME`` and the others of the mixin are.

    Args:
        task_weights: ``[K]``, lambda of Eq. 2; None: one task.

    The other arguments are those of ``SFTTrainer`` and :class:`TaskWeightedTrainerMixin`.

    Raises:
        ValueError: an option joins samples of several tasks in a row, or asks for another loss.
    """


def _check(config: Any) -> None:
    if config.packing or config.padding_free:
        raise ValueError(
            "packing and padding_free of SFTConfig join samples in one row and lose loss_task_ids: leave them off"
        )
    if getattr(config, "loss_type", None) == "dft":
        raise ValueError("loss_type='dft' of SFTConfig is another loss than Eq. 2: leave it out")
    if config.use_liger_kernel:
        raise ValueError("use_liger_kernel of SFTConfig brings a loss without task weights: leave it out")
