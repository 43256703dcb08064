"""Batches: right padding, task ids, and an image in every batch.

Legend: B samples, S tokens of the longest.
"""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from trainer.data.ahead import handed_over
from trainer.data.encoding import IGNORE_INDEX, ConversationEncoder, Encoded, join
from trainer.data.records import Record
from trainer.tasks import Task

# Of all samples that a data set keeps. A token takes 44 bytes, as a Python number in two lists, and every rank and
# every worker of its data loader has a data set of its own.
MOST_KEPT_TOKENS = 2**21


class MixtureDataset(Dataset[dict[str, Any]]):
    """The records of one training with their task ids; encoded when asked for.

    Args:
        encoder: of the model.
        tasks: of the run.
        records: of each task.
        again: samples will be asked for again in this process: the first without pixels are kept.
    """

    def __init__(
        self,
        encoder: ConversationEncoder,
        tasks: Sequence[Task],
        records: Sequence[Sequence[Record]],
        again: bool = True,
    ) -> None:
        self.encoder = encoder
        self.tasks = tasks
        self._records = records
        self._starts = list(itertools.accumulate(map(len, records), initial=0))  # of each task, among all records
        self._chosen: Sequence[int] = range(self._starts[-1])
        self._kept: dict[int, dict[str, Any]] = {}
        self._room = MOST_KEPT_TOKENS if again else 0

    def __len__(self) -> int:
        return len(self._chosen)

    def choose(self, samples: Iterable[int]) -> None:
        """Keeps some of the samples, in this order."""
        self._chosen, self._kept = array("q", [self._chosen[index] for index in samples]), {}

    def record(self, index: int) -> tuple[int, Record]:
        """A sample's task id and record."""
        place = self._chosen[index]
        task_id = bisect.bisect_right(self._starts, place) - 1
        return task_id, self._records[task_id][place - self._starts[task_id]]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self._kept:
            return self._kept[index]
        task_id, record = self.record(index)
        sample: dict[str, Any] = {
            "encoded": self.encoder.training_sample(record, self.tasks[task_id].image_path),
            "task_id": task_id,
        }
        if not record.images or self.encoder.features is not None:
            self._room -= len(sample["encoded"].input_ids)
            if self._room >= 0:
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
        blank = self.blank_image if not any(sample.image_inputs for sample in encoded) else None
        shown = [sample.input_ids for sample in encoded]
        types = {name: [sample.token_types[name] for sample in encoded] for name in encoded[0].token_types}
        if blank:
            shown[0] = shown[0] + blank.input_ids
            for name, rows in types.items():
                rows[0] = rows[0] + blank.token_types[name]
        width = max(map(len, shown))
        return handed_over(
            {
                "input_ids": pad(shown, self.pad_token_id, width),
                "attention_mask": pad([[1] * len(sample.input_ids) for sample in encoded], 0, width),
                "labels": pad([sample.labels for sample in encoded], IGNORE_INDEX, width),
                "loss_task_ids": torch.tensor([sample["task_id"] for sample in samples]),
                **{name: pad(rows, 0, width) for name, rows in types.items()},
                **stack_images([blank] if blank else encoded),
            }
        )


def pad(rows: Sequence[Sequence[int]], fill: int, width: int, side: Literal["left", "right"] = "right") -> Tensor:
    """``[B, width]`` int64, every row filled up on that side."""
    padded = torch.full((len(rows), width), fill)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(len(row))
        padded[index, place] = torch.tensor(row, dtype=torch.long)
    return padded


def stack_images(samples: Sequence[Encoded]) -> dict[str, Tensor]:
    """The image inputs of several samples together."""
    keys = {key: None for sample in samples for key in sample.image_inputs}
    return {key: join([sample.image_inputs[key] for sample in samples if key in sample.image_inputs]) for key in keys}
