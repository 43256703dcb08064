"""A look at the loaded model before a packed training: do samples in one sequence really not see each other?"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.data.encoding import IGNORE_INDEX, Encoded
from trainer.data.packing import PackedCollator, PackedDataset
from trainer.errors import UserError
from trainer.loop.measuring import forward_only

_TOKENS = 8  # of a probe's sample
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # keys of configurations with a router


class PackingProbe(TrainerCallback):
    """Compares a sample's loss behind two different samples of the same length, and refuses a model that tells them.

    The two forward passes differ in values that must not be used, and in nothing else: same shapes, same kernels. So
    the losses of a dense model are equal but for reductions in no fixed order. Where tokens choose experts, a product's
    shape depends on what the other sample chose, and its rounding with it. A leak is far above either: it changes what
    half of the tokens in sight are. Every rank runs the same two passes, as ZeRO-3 needs.
    """

    def __init__(self, trainer: Trainer, collator: PackedCollator, dataset: PackedDataset) -> None:
        self._trainer = trainer
        self._collator = collator
        self._dataset = dataset

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        first = self._dataset[0][0]["encoded"]
        words = [label for label in first.labels if label != IGNORE_INDEX]  # plain text, whatever the model's images
        words = (words * _TOKENS)[:_TOKENS]
        others = words[::-1] if words[::-1] != words else [int(token == 0) for token in words]
        silent = [IGNORE_INDEX] * _TOKENS
        losses = []
        for before in (words, others):
            row = [Encoded(before, silent), Encoded(words, words)]
            batch = self._collator([[{"encoded": one, "task_id": 0} for one in row]])
            losses.append(forward_only(self._trainer, [batch], len(self._weights())).loss_sum[0])
        if abs(losses[0] - losses[1]) > self._rounding() * abs(losses[0]):
            raise UserError(
                f"training.packing: in this {type(self._trainer.model).__name__} with "
                f"{self._attention()} attention a sample's loss depends on the sample before it "
                f"({losses[0].item():.6g} and {losses[1].item():.6g}); turn packing off"
            )

    def _weights(self) -> Any:
        return self._trainer.weighting.weights  # type: ignore[attr-defined]  # a TaskWeightedTrainer

    def _rounding(self) -> float:
        """How far the two losses may be apart relative to their size."""
        model: Any = self._trainer.model
        text = model.config.get_text_config()
        routed = any(getattr(text, name, None) for name in _EXPERTS)
        half = next(model.parameters()).dtype != torch.float32
        return (1e-2 if half else 1e-4) if routed else (1e-3 if half else 1e-6)

    def _attention(self) -> str:
        model: Any = self._trainer.model
        return str(model.config.get_text_config()._attn_implementation)
