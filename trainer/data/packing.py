"""Packing: several short samples in one sequence, each as if it were alone.

A sample attends to itself only, its positions start at 0, and nothing predicts its first token. So the loss is that of
the samples one by one; what changes is that less is padded, and that ``batch_size`` counts sequences.

Legend: B sequences, S tokens of the longest, T tokens of all.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trainer.data.ahead import handed_over
from trainer.data.collator import stack_images
from trainer.data.encoding import IGNORE_INDEX, Encoded

WINDOW = 1024  # samples that are packed together; larger fills better, smaller stays closer to a random order
Sample = dict[str, Any]


def pack(lengths: Sequence[int], capacity: int, seed: int, window: int = WINDOW) -> list[list[int]]:
    """Samples to sequences: first-fit decreasing within windows of a random order.

    Depends on the arguments only, so every rank and every restart has the same sequences.

    Args:
        lengths: tokens of every sample, 1 to `capacity`.
        capacity: tokens of a sequence at most.
        seed: of the order.
        window: samples at a time.

    Returns:
        Indices of the samples in each sequence; every sample in exactly one.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"sample {index} has {length} tokens; a sequence takes 1 to {capacity}")
    order = list(range(len(lengths)))
    random.Random(f"{seed}/packing").shuffle(order)
    sequences: list[list[int]] = []
    for start in range(0, len(order), window):
        # Sorting is stable, so samples of the same length stay in their random order.
        chosen = sorted(order[start : start + window], key=lambda index: -lengths[index])
        sequences += _first_fit([lengths[index] for index in chosen], chosen, capacity)
    return sequences


def _first_fit(lengths: list[int], samples: list[int], capacity: int) -> list[list[int]]:
    room = np.full(len(samples), capacity)  # of one sequence per sample at worst
    bins: list[list[int]] = []
    for sample, length in zip(samples, lengths, strict=True):
        place = int(np.argmax(room >= length))  # the first that fits; a sequence not begun yet always does
        if place == len(bins):
            bins.append([])
        bins[place].append(sample)
        room[place] -= length
    return bins


class PackedDataset(Dataset[list[Sample]]):
    """Sequences of samples; an item is the list of a sequence's samples, encoded when asked for."""

    def __init__(self, samples: Dataset[Sample], sequences: Sequence[Sequence[int]]) -> None:
        self.samples = samples
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> list[Sample]:
        return [self.samples[sample] for sample in self.sequences[index]]


@dataclass
class PackedCollator:
    """Lays sequences of samples out as a batch with task ids for every token.

    The model gets no attention mask: transformers finds the samples by their positions, which start again at 0, and
    keeps attention within each. ``use_cache`` is off, since a cache would turn that off. Padding counts as a sample of
    its own, without loss. A batch without any image gets a blank one as a sample of its own, see ``Collator``.

    Args:
        pad_token_id: what fills up.
        blank_image: for batches without an image; None when no record has one.
        flat: one row of T tokens without padding, which flash attention needs to tell samples apart, in place of
            B rows of S, whose masks for other attention take B S S and not T T.
        positions: of the tokens of one sample, for models whose positions have several dimensions: ``[3, tokens]``.
            Such a model gets ``position_ids`` ``[4, B, S]``: those that tell samples apart, then its own.
    """

    pad_token_id: int
    blank_image: Encoded | None
    flat: bool = False
    positions: Callable[[Encoded], Tensor] | None = None

    def __call__(self, sequences: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        rows = [[(sample["encoded"], sample["task_id"]) for sample in sequence] for sequence in sequences]
        if self.blank_image and not any(encoded.image_inputs for row in rows for encoded, _ in row):
            rows[0] = [*rows[0], (self.blank_image, 0)]
        documents = [encoded for row in rows for encoded, _ in row]
        types = {name: 0 for encoded in documents for name in encoded.token_types}
        laid = [self._lay(row, types) for row in ([[item for row in rows for item in row]] if self.flat else rows)]
        width = max(len(row["input_ids"]) for row in laid)
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX, "loss_task_ids": 0, "position_ids": 0, **types}
        batch: dict[str, Any] = {}
        for key, value in fill.items():
            batch[key] = torch.full((*laid[0][key].shape[:-1], len(laid), width), value)
            for index, row in enumerate(laid):
                batch[key][..., index, : row[key].shape[-1]] = row[key]
        for index, row in enumerate(laid):  # padding is a document too, so that it sees something: itself
            length = len(row["input_ids"])
            batch["position_ids"][..., index, length:] = torch.arange(width - length)
        return handed_over(batch | {"use_cache": False} | stack_images(documents))

    def _lay(self, documents: Sequence[tuple[Encoded, int]], types: Iterable[str]) -> dict[str, Tensor]:
        """One sequence: token ids, labels, task ids, positions and types of tokens, each ``[tokens]``."""
        tokens = [len(encoded.input_ids) for encoded, _ in documents]
        positions = [torch.arange(count) for count in tokens]
        if self.positions:
            own = [self.positions(encoded) for encoded, _ in documents]
            positions = [torch.cat([apart[None], place]) for apart, place in zip(positions, own, strict=True)]
        rows = {
            "input_ids": [encoded.input_ids for encoded, _ in documents],
            "labels": [[IGNORE_INDEX, *encoded.labels[1:]] for encoded, _ in documents],
            "loss_task_ids": [[task] * count for (_, task), count in zip(documents, tokens, strict=True)],
        } | {
            name: [encoded.token_types.get(name) or [0] * len(encoded.input_ids) for encoded, _ in documents]
            for name in types
        }
        laid = {name: torch.tensor(list(itertools.chain(*row))) for name, row in rows.items()}
        return laid | {"position_ids": torch.cat(positions, -1)}
