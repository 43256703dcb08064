"""``transformers.Trainer`` with the loss of Eq. 2: its normaliser is global, its weights are a balancing method's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback

from cotbal_kernels.huggingface import TaskWeightedTrainerMixin
from trainer.data.whole_batches import RandomOrder, WholeBatches
from trainer.loop.learning_rates import set_own_rates
from trainer.loop.weighting import TaskWeighting


class TaskWeightedTrainer(TaskWeightedTrainerMixin, Trainer):
    """A Trainer whose loss runs over every supervised token of the optimizer step, weighted by `weighting`.

    Parts of the model that `learning_rates` names have learning rates of their own.
    """

    def __init__(
        self,
        *,
        weighting: TaskWeighting,
        learning_rates: Mapping[str, float] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        # First, so that what later callbacks write describes a step that is over for the weighting too.
        super().__init__(task_names=weighting.tasks.names, callbacks=[weighting, *callbacks], **kwargs)
        self.weighting = weighting
        self.learning_rates = learning_rates or {}
        weighting.attach(self)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and self.learning_rates:
            assert self.model is not None
            set_own_rates(optimizer, self.model, self.learning_rates)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """A warm-up of less than one step is none: the first step of a warm-up has rate 0, and may be the only one."""
        if self.args.warmup_steps * num_training_steps < 1:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        data = self.train_dataset if train_dataset is None else train_dataset
        return RandomOrder(data, self.args.seed) if isinstance(data, WholeBatches) else super()._get_train_sampler(data)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Nothing behind the last step, whose checkpoint ``Trainer`` itself goes on from with one more."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def step_normalizer(self, batches: Sequence[dict[str, Any]]) -> Tensor:
        """Fixes the weights of the step too."""
        return self.weighting.begin_step(batches)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.weighting.micro_batch(outputs["task_loss"], outputs["task_tokens"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the method has seen of validation records."""
        found = self.weighting.take_validation_losses()
        super().log(logs | {f"task_validation_loss/{name}": loss for name, loss in found.items()}, start_time)

    def logged_task_weights(self) -> Tensor:
        """Not those of the model, which may be measuring with others."""
        return self.weighting.weights
