"""Batches: right padding, task ids, and an image in every batch.

Legend: B samples, S tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from trainer.data.encoding import IGNORE_INDEX, ConversationEncoder, Encoded
from trainer.data.records import Record
from trainer.tasks import Task


class MixtureDataset(Dataset[dict[str, Any]]):
    """The records of one training with their task ids; encoded when asked for, and kept when they carry no pixels."""

    def __init__(self, encoder: ConversationEncoder, tasks: Sequence[Task], records: Sequence[list[Record]]) -> None:
        self.encoder = encoder
        self.tasks = tasks
        self.items = [(k, record) for k, chosen in enumerate(records) for record in chosen]
        self._kept: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self._kept:
            return self._kept[index]
        task_id, record = self.items[index]
        sample = {
            "encoded": self.encoder.training_sample(record, self.tasks[task_id].image_path),
            "task_id": task_id,
        }
        if not record.images or self.encoder.features is not None:
            self._kept[index] = sample
        return sample


@dataclass
class Collator:
    """Pads samples to the longest and adds ``loss_task_ids`` ``[B]``.

    A batch without any image gets a blank one: its placeholder tokens are masked out after the end of the first
    sample. Otherwise the projector would get no gradient on a rank that happens to draw only text, and the ranks
    would wait for each other for ever.
    """

    pad_token_id: int
    blank_image: Encoded | None

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        encoded: list[Encoded] = [sample["encoded"] for sample in samples]
        padding = self.blank_image if not any(sample.image_inputs for sample in encoded) else None
        extra = len(padding.input_ids) if padding else 0
        width = max(len(sample.input_ids) + (extra if row == 0 else 0) for row, sample in enumerate(encoded))
        input_ids = torch.full((len(encoded), width), self.pad_token_id)
        labels = torch.full((len(encoded), width), IGNORE_INDEX)
        attention_mask = torch.zeros((len(encoded), width), dtype=torch.long)
        for row, sample in enumerate(encoded):
            length = len(sample.input_ids)
            input_ids[row, :length] = torch.tensor(sample.input_ids)
            labels[row, :length] = torch.tensor(sample.labels)
            attention_mask[row, :length] = 1
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "loss_task_ids": torch.tensor([sample["task_id"] for sample in samples]),
        }
        if padding:
            start = len(encoded[0].input_ids)
            input_ids[0, start : start + extra] = torch.tensor(padding.input_ids)
            encoded = [padding]
        return batch | stack_images(encoded)


def stack_images(samples: Sequence[Encoded]) -> dict[str, Tensor]:
    """The image inputs of several samples, one after the other along the first dimension."""
    keys = {key: None for sample in samples for key in sample.image_inputs}
    return {
        key: torch.cat([sample.image_inputs[key] for sample in samples if key in sample.image_inputs]) for key in keys
    }
