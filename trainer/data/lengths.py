"""How long samples are before training starts, counted without decoding an image.

Packing needs every length, and so does a rule for samples longer than ``model.max_length`` (``training.overlong``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.bars import watched
from trainer.data.ahead import tried
from trainer.data.encoding import ConversationEncoder, TooLongError
from trainer.data.pictures import image_size
from trainer.data.records import Record
from trainer.errors import UserError, one_of

_SIZES = [(64, 64), (900, 150), (640, 480)]  # pixels; a model that tiles images gives each its own number of tokens


@dataclass(frozen=True, slots=True)
class SampleLength:
    """A sample as training would see it. ``tokens`` is 0 when ``overlong: drop`` leaves it out."""

    tokens: int
    supervised: int
    cut: bool

    @property
    def dropped(self) -> bool:
        return self.tokens == 0


class ImageLengths:
    """Stands in for image features when only tokens are counted: as many as the processor makes of images of a size.

    They are found once for every size, with blank images. Where all sizes have the same number no file is opened, else
    its header. One that cannot be read counts as a small image; to report it is another check's.
    """

    def __init__(self, plain: ConversationEncoder) -> None:
        self._plain = plain
        self._found: dict[tuple[tuple[int, int], ...], tuple[int, int]] = {}
        one = self._measured(_SIZES[:1])
        self.one_by_one = plain.one_by_one
        alike = self.one_by_one and all(self._measured([size]) == one for size in _SIZES)
        self._each = one if alike else None

    def of(self, paths: Sequence[Path]) -> list[Tensor]:
        if self._each is not None:
            return [torch.empty(self._each[0], 0) for _ in paths]
        # Together they may have fewer than one by one: the first stands for all.
        first = self._measured([_size(path) for path in paths])[0] - len(paths) + 1
        return [torch.empty(first, 0), *(torch.empty(1, 0) for _ in paths[1:])]

    def example(self) -> Tensor:
        return torch.empty(self._measured(_SIZES[:1])[0], 0)

    def values(self, paths: Sequence[Path]) -> int:
        """Numbers that the image encoder reads of the images of one text: pixels of all tiles, times channels."""
        if self._each is not None:
            return self._each[1] * len(paths)
        sizes = [_size(path) for path in paths]
        if self.one_by_one:  # together they would be filled up to one number of tiles, which the encoder leaves out
            return sum(self._measured([size])[1] for size in sizes)
        return self._measured(sizes)[1] if sizes else 0

    def _measured(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Tokens of images, and numbers that the encoder reads."""
        key = tuple(sizes)
        if key not in self._found:
            blank = self._plain.blank_image(sizes)
            pixels = blank.image_inputs.get("pixel_values")
            self._found[key] = len(blank.input_ids), 0 if pixels is None else pixels.numel()
        return self._found[key]


def _size(path: Path) -> tuple[int, int]:
    """Width and height in pixels."""
    try:
        return image_size(path)
    except Exception:  # whatever Pillow's plugins stumble over
        return _SIZES[0]


def token_counter(
    processor: Any, max_length: int, table: int | None = None, vocabulary: int | None = None
) -> ConversationEncoder:
    """An encoder that lays out tokens and labels, as many as of the processor's own, without decoding an image."""
    plain = ConversationEncoder(processor, max_length, None, table, vocabulary)
    if not plain.reads_images:
        return plain
    return ConversationEncoder(processor, max_length, ImageLengths(plain), table, vocabulary)


def image_values(encoder: ConversationEncoder, record: Record, image_path: Callable[[str], Path]) -> int:
    """Numbers that make up the record's images, as a :func:`token_counter` knows them."""
    images = encoder.features
    return images.values([image_path(image) for image in record.images]) if isinstance(images, ImageLengths) else 0


def counter_of(encoder: ConversationEncoder) -> ConversationEncoder:
    """The cheapest encoder whose lengths are those of `encoder`."""
    if encoder.features is not None:
        return encoder
    return token_counter(encoder.processor, encoder.max_length, encoder.table, encoder.vocabulary)


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


def measure_all(count: int, measure: Callable[[int], SampleLength], processes: int = 0) -> list[SampleLength]:
    """``measure(0 .. count - 1)``, shared out over the ranks of a training; every rank gets all of it.

    Args:
        processes: of each rank, beside it.

    Raises:
        UserError: on every rank alike, the first problem in the order of samples, and how many there are.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = range(rank, count, world)
    measured = tried(measure, own, processes)
    mine = list(measured if rank else watched(measured, "lengths", "sample", len(own)))
    shares: list[list[SampleLength | str]] = [mine]
    if world > 1:
        shares = [[] for _ in range(world)]
        dist.all_gather_object(shares, mine)
    found = [shares[index % world][index // world] for index in range(count)]
    problems = [item for item in found if isinstance(item, str)]
    if problems:
        raise UserError(one_of(problems[0], len(problems)))
    return [item for item in found if isinstance(item, SampleLength)]
