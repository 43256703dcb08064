"""``transformers.Trainer`` with the loss of Eq. 2: its normaliser is global, its weights are a balancing method's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Trainer, TrainerCallback

from trainer.loop.weighting import TaskWeighting


class TaskWeightedTrainer(Trainer):
    """A Trainer whose loss runs over every supervised token of the optimizer step, weighted by `weighting`."""

    def __init__(self, *, weighting: TaskWeighting, callbacks: Sequence[TrainerCallback] = (), **kwargs: Any) -> None:
        # First, so that what later callbacks write describes a step that is over for the weighting too.
        super().__init__(callbacks=[weighting, *callbacks], **kwargs)
        self.weighting = weighting
        weighting.attach(self)
        count = len(weighting.tasks.names)
        self._task_loss = torch.zeros(count, dtype=torch.float64, device=self.args.device)
        self._task_tokens = torch.zeros(count, dtype=torch.float64, device=self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor | None:
        """The denominator of the loss over the accumulation window and all ranks.

        ``Trainer`` calls this once before every optimizer step, hands the result to the model as
        ``num_items_in_batch`` and multiplies the loss by the number of processes, which undoes the averaging of
        gradients.
        """
        return self.weighting.begin_step(batch_samples) if batch_samples else None

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._task_loss += outputs["task_loss"]
        self._task_tokens += outputs["task_tokens"]
        self.weighting.micro_batch(outputs["task_loss"], outputs["task_tokens"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds mean cross-entropy and tokens per task since the last log, over all ranks, and the step's weights."""
        if "loss" in logs:
            sums = torch.stack([self._task_loss, self._task_tokens])
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(sums)
            weights = self.weighting.weights.tolist()
            for name, total, tokens, weight in zip(self.weighting.tasks.names, *sums.tolist(), weights, strict=True):
                if tokens:
                    logs |= {f"task_loss/{name}": total / tokens, f"task_tokens/{name}": tokens}
                    logs[f"task_weight/{name}"] = weight
            self._task_loss.zero_()
            self._task_tokens.zero_()
        super().log(logs, start_time)
