"""Data sets whose length the batches of all processes divide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from trainer.data.encoding import IGNORE_INDEX


class WholeBatches(Dataset[Any]):
    """A data set and behind it samples without loss, as many as make its length a multiple.

    A data loader of several processes fills the last batch of an epoch up with samples that it has had. Their tokens
    would count twice in Eq. 2; those of samples without loss do not count.

    Args:
        samples: items are a sample, or a list of the samples of a packed sequence; not empty.
        multiple: samples of all processes in one micro-batch.
    """

    def __init__(self, samples: Dataset[Any], multiple: int) -> None:
        self.samples = samples
        self.own = len(samples)  # type: ignore[arg-type]
        self.whole = -(-self.own // multiple) * multiple

    def __len__(self) -> int:
        return self.whole

    def __getitem__(self, index: int) -> Any:
        if index < self.own:
            return self.samples[index]
        item = self.samples[index % self.own]
        return [_without_loss(sample) for sample in item] if isinstance(item, list) else _without_loss(item)


def _without_loss(sample: dict[str, Any]) -> dict[str, Any]:
    encoded = sample["encoded"]
    return sample | {"encoded": replace(encoded, labels=[IGNORE_INDEX] * len(encoded.labels))}
