"""Data sets whose length the batches of all processes divide, in an order that does not depend on these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

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
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called before every epoch, and by a training that goes on within one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.whole

    def __getitem__(self, index: int) -> Any:
        if index < self.own:
            return self.samples[index]
        item = self.samples[index % self.own]
        return [_without_loss(sample) for sample in item] if isinstance(item, list) else _without_loss(item)


class RandomOrder(Sampler[int]):
    """The samples of :class:`WholeBatches` in another random order in every epoch; behind them those without loss.

    So an optimizer step has the same samples however it is spread over processes and micro-batches.

    Args:
        data: what is ordered.
        seed: of the orders.
    """

    def __init__(self, data: WholeBatches, seed: int) -> None:
        self._data = data
        self._seed = seed

    def __len__(self) -> int:
        return self._data.whole

    def __iter__(self) -> Iterator[int]:
        # The data knows the epoch: accelerate's loader does not tell a sampler of several processes within an epoch.
        generator = torch.Generator().manual_seed(self._seed + self._data.epoch)
        yield from torch.randperm(self._data.own, generator=generator).tolist()
        yield from range(self._data.own, self._data.whole)


def _without_loss(sample: dict[str, Any]) -> dict[str, Any]:
    encoded = sample["encoded"]
    return sample | {"encoded": replace(encoded, labels=[IGNORE_INDEX] * len(encoded.labels))}
