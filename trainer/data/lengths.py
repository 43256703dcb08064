"""How long samples are before training starts: counted without opening an image where that is exact.

Packing needs every length, and so does a rule for samples longer than ``model.max_length`` (``training.overlong``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from trainer.data.encoding import ConversationEncoder, TooLongError
from trainer.data.records import Record
from trainer.errors import UserError

_SIZES = ((64, 64), (900, 150), (640, 480))  # pixels; a model that tiles images gives each its own number of tokens


@dataclass(frozen=True, slots=True)
class SampleLength:
    """A sample as training would see it. ``tokens`` is 0 when ``overlong: drop`` leaves it out."""

    tokens: int
    supervised: int
    cut: bool

    @property
    def dropped(self) -> bool:
        return self.tokens == 0


class BlankImages:
    """Stands in for image features when only tokens are counted: every image has as many as a blank one.

    Models that cut an image into a number of tiles that depends on its size may need more for a large one.
    """

    def __init__(self, tokens: int) -> None:
        self._features_P0 = torch.empty(tokens, 0)

    def __getitem__(self, path: Path) -> Tensor:
        return self._features_P0

    def example(self) -> Tensor:
        return self._features_P0


def token_counter(processor: Any, max_length: int) -> ConversationEncoder:
    """An encoder that lays out tokens and labels without opening an image."""
    plain = ConversationEncoder(processor, max_length)
    if not plain.reads_images:
        return plain
    return ConversationEncoder(processor, max_length, BlankImages(len(plain.blank_image().input_ids)))


def exact_counter(encoder: ConversationEncoder) -> ConversationEncoder:
    """The cheapest encoder whose lengths are those of `encoder`, whatever the images.

    Where every image has the same number of tokens none is opened; a model that tiles images gets `encoder` itself.
    """
    if encoder.features is not None or not encoder.reads_images:
        return encoder
    token = encoder.image_token
    counts = {
        len(encoder.processor(text=token, images=[Image.new("RGB", size)], add_special_tokens=False)["input_ids"][0])
        for size in _SIZES
    }
    return token_counter(encoder.processor, encoder.max_length) if len(counts) == 1 else encoder


def sample_length(
    encoder: ConversationEncoder, record: Record, image_path: Callable[[str], Path], overlong: str
) -> SampleLength:
    """The length of one sample under a rule for overlong ones: ``truncate``, ``refuse`` or ``drop``.

    Raises:
        UserError: the record cannot be used; with ``refuse``, it is longer than the limit.
    """
    try:
        encoded = encoder.training_sample(record, image_path)
    except TooLongError:
        if overlong == "drop":
            return SampleLength(0, 0, False)
        raise
    if encoded.truncated and overlong == "refuse":
        raise TooLongError(
            f"record '{record.id}' is longer than model.max_length = {encoder.max_length} tokens, and "
            "training.overlong is 'refuse'; raise max_length, or choose 'truncate' or 'drop'"
        )
    if encoded.truncated and overlong == "drop":
        return SampleLength(0, 0, False)
    return SampleLength(len(encoded.input_ids), encoded.supervised, encoded.truncated)


def measure_all(count: int, measure: Callable[[int], SampleLength]) -> list[SampleLength]:
    """``measure(0 .. count - 1)``, shared out over the ranks of a training; every rank gets all of it.

    Raises:
        UserError: on every rank alike, the first problem in the order of samples, and how many there are.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine: list[SampleLength | str] = []
    for index in range(rank, count, world):
        try:
            mine.append(measure(index))
        except UserError as error:
            mine.append(str(error))
    shares: list[list[SampleLength | str]] = [mine]
    if world > 1:
        shares = [[] for _ in range(world)]
        dist.all_gather_object(shares, mine)
    found = [shares[index % world][index // world] for index in range(count)]
    problems = [item for item in found if isinstance(item, str)]
    if problems:
        more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)
    return [item for item in found if isinstance(item, SampleLength)]


def kept(lengths: Sequence[SampleLength]) -> list[int]:
    """Indices of the samples that are not dropped."""
    return [index for index, length in enumerate(lengths) if not length.dropped]
