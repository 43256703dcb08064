"""Conversations to token ids, labels and image inputs, for any processor with a chat template.

Every part of a rendered conversation is tokenised for itself, so that a prompt in generation has exactly the tokens of
training, but as what goes on after the part before: SentencePiece tokenizers begin a text with a blank. Parts with an
image go through the processor, which expands the placeholder into as many tokens as the image has patches.

Legend: S tokens of one sample, P patches of one image, C feature channels.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from trainer.data.chat import ChatTemplate, Part, end_of_text
from trainer.data.pictures import open_image
from trainer.data.records import IMAGE_PLACEHOLDER, Record
from trainer.errors import UserError, listed

IGNORE_INDEX = -100
_TOKEN_TYPES = "token_type_ids"  # ends the names of inputs that tell tokens apart, one number for each
_UNSUPPORTED = {
    "cross_attention_mask": "it attends to images outside of the sequence",
    "labels": "its prompts attend in both directions, and it marks them by itself",
}
_TEXT_INPUTS = ("input_ids", "attention_mask")


class TooLongError(UserError):
    """A sample of which nothing useful is left within the limit; names the record."""


class ImageFeatures(Protocol):
    """Features of images, used in place of pixels.

    Attributes:
        one_by_one: whether an image has as many of them among others as alone.
    """

    @property
    def one_by_one(self) -> bool: ...

    def of(self, paths: Sequence[Path]) -> list[Tensor]:
        """``[P, C]`` for each of the images that stand in one text."""

    def example(self) -> Tensor:
        """Features of some image, for their shape."""


@dataclass
class Encoded:
    """One sample.

    Attributes:
        input_ids: its tokens.
        labels: of each token, ``IGNORE_INDEX`` where it carries no loss.
        image_inputs: what the model's forward takes besides text, of all its images.
        truncated: whether it was longer than the limit.
        token_types: for models that are told which tokens are an image's, one number for each token.
    """

    input_ids: list[int]
    labels: list[int]
    image_inputs: dict[str, Tensor] = field(default_factory=dict)
    truncated: bool = False
    token_types: dict[str, list[int]] = field(default_factory=dict)

    @property
    def supervised(self) -> int:
        """Tokens that carry loss; the first position has none before it to predict it."""
        own = self.labels[1:]
        return len(own) - own.count(IGNORE_INDEX)


@dataclass(frozen=True)
class _Piece:
    """What the processor makes of a part of a conversation."""

    ids: list[int]
    image_inputs: dict[str, Tensor] = field(default_factory=dict)
    token_types: dict[str, list[int]] = field(default_factory=dict)

    def behind(self, count: int) -> _Piece:
        """All but the first tokens, of text."""
        types = {name: own[count:] for name, own in self.token_types.items()}
        return _Piece(self.ids[count:], self.image_inputs, types)


def padding_token(tokenizer: Any) -> int:
    """What fills batches up: the end of a text where a tokenizer has no token for it (Llama 3, Mistral).

    Any would do, since padding is masked and has no loss.

    Raises:
        UserError: it has neither.
    """
    return end_of_text(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def join(parts: Sequence[Tensor]) -> Tensor:
    """Image inputs one after the other along the first dimension.

    Images of other sizes, or of other numbers of tiles, are filled up with zeros at the end of each dimension, as
    processors do in a batch; models tell by their other inputs, or by the zeros, what is no image.
    """
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    if all(list(part.shape[1:]) == shape for part in parts):
        return torch.cat(list(parts))
    whole = parts[0].new_zeros((sum(part.shape[0] for part in parts), *shape))
    start = 0
    for part in parts:
        place = (slice(start, start + part.shape[0]), *map(slice, part.shape[1:]))
        whole[place] = part
        start += part.shape[0]
    return whole


class ConversationEncoder:
    """Encodes records for training and prompts for generation.

    Args:
        processor: a transformers processor (or tokenizer) with a chat template.
        max_length: longest sample in tokens; what is past it is cut from the end.
        features: precomputed features of a frozen vision tower, used in place of pixels when given.
        table: positions that the model has, where a prompt and its answer must end; None is no limit.
        vocabulary: tokens that the model has embeddings of; None leaves them unchecked.

    Raises:
        UserError: there is no token to fill batches up with, or the model has no embedding of it.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int,
        features: ImageFeatures | None = None,
        table: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.max_length = max_length
        self.features = features
        self.table, self.vocabulary = table, vocabulary
        self._check_ids("the padding of batches", [padding_token(self.tokenizer)])
        self.chat = ChatTemplate(processor, self.image_token)

    def training_sample(self, record: Record, image_path: Callable[[str], Path]) -> Encoded:
        """Token ids and labels of a whole conversation; only the answers are supervised.

        Raises:
            UserError: an image's tokens do not fit into ``max_length``, or no supervised token is left.
        """
        encoded = self._encode(record, self._parts(record), image_path, self.max_length)
        encoded.truncated = len(encoded.input_ids) > self.max_length
        for row in (encoded.input_ids, encoded.labels, *encoded.token_types.values()):
            del row[self.max_length :]
        if not encoded.supervised:
            problem = TooLongError if encoded.truncated else UserError
            remedy = "; raise model.max_length or take the record out" if encoded.truncated else ""
            raise problem(f"record '{record.id}': no supervised token within {self.max_length} tokens{remedy}")
        return encoded

    def prompt(self, record: Record, image_path: Callable[[str], Path]) -> Encoded:
        """What stands before the last answer of a record, ready for generation; never cut."""
        *before, last = record.turns
        if not last.answer.strip():  # it may be secret, and some templates take no empty text
            record = replace(record, turns=(*before, replace(last, answer="?")))
        encoded = self._encode(record, self._parts(record)[:-1], image_path)
        encoded.labels = [IGNORE_INDEX] * len(encoded.input_ids)
        return encoded

    def _encode(
        self, record: Record, parts: Sequence[Part], image_path: Callable[[str], Path], limit: int | None = None
    ) -> Encoded:
        """Tokens of all parts; an error if images are past the limit."""
        images = iter(record.images)  # without any, the token is text
        counts = [part.text.count(self.image_token) if record.images else 0 for part in parts]
        used = [[image_path(next(images)) for _ in range(count)] for count in counts]
        if sum(map(bool, used)) > 1 and not self.one_by_one:
            raise UserError(
                f"record '{record.id}' has images in several turns, and the model's processor makes less of an image "
                "among others; put all of them into the first question"
            )
        encoded = Encoded([], [], token_types={name: [] for name in self._token_types})
        for part, piece in zip(parts, self._tokenize([part.text for part in parts], used), strict=True):
            ids = piece.ids
            if part.kind == "answer" and not self.chat.ends_turn(part.text):
                ids = [*ids, end_of_text(self.tokenizer)]  # a template without an end mark never teaches stopping
            encoded.input_ids += ids
            encoded.labels += [IGNORE_INDEX] * len(ids) if part.kind == "prompt" else ids
            for name, types in encoded.token_types.items():
                types += piece.token_types.get(name, [0] * len(ids))
            for key, value in piece.image_inputs.items():
                held = encoded.image_inputs.get(key)
                encoded.image_inputs[key] = value if held is None else join([held, value])
            if piece.image_inputs and limit is not None and len(encoded.input_ids) > limit:
                raise TooLongError(
                    f"record '{record.id}': its images and the text around them need {len(encoded.input_ids)} "
                    f"tokens, more than model.max_length = {limit}; raise max_length"
                )
        self._check_ids(f"record '{record.id}'", encoded.input_ids)
        return encoded

    def _check_ids(self, what: str, ids: list[int]) -> None:
        """On a GPU a token without an embedding is an error of the device that names nothing."""
        if self.vocabulary is None or max(ids) < self.vocabulary:
            return
        image = self.tokenizer.convert_tokens_to_ids(self.image_token)  # its embedding is the image's, not the table's
        if unknown := sorted({token for token in ids if token >= self.vocabulary} - {image}):
            spelt = self.tokenizer.convert_ids_to_tokens(unknown)
            names = [f"'{name}' ({token})" for token, name in zip(unknown, spelt, strict=True)]
            raise UserError(
                f"{what}: the tokenizer gives {listed(names)}, and the model has embeddings of {self.vocabulary} "
                "tokens; take the tokenizer that belongs to the model, or load the model with transformers, "
                "resize_token_embeddings to the length of the tokenizer, and save both"
            )

    def blank_image(self, sizes: Sequence[tuple[int, int]] = ((64, 64),)) -> Encoded:
        """Tokens and inputs of a black image, for a batch that would otherwise not call the vision tower.

        Args:
            sizes: width and height in pixels, of each where there are to be several.
        """
        if self.features is not None:
            piece = self._with_features(self.image_token, [torch.zeros_like(self.features.example())])
        else:
            piece = self._with_pictures(self.image_token * len(sizes), [Image.new("RGB", size) for size in sizes])
        return Encoded(piece.ids, [IGNORE_INDEX] * len(piece.ids), piece.image_inputs, token_types=piece.token_types)

    @property
    def reads_images(self) -> bool:
        """Whether the model takes images; a tokenizer alone belongs to one that reads text only."""
        return self.chat.reads_images

    @property
    def image_token(self) -> str:
        """What stands for an image in rendered text."""
        return getattr(self.processor, "image_token", IMAGE_PLACEHOLDER)

    @cached_property
    def _token_types(self) -> tuple[str, ...]:
        """Names of the inputs of this model that tell an image's tokens from others, in every sample."""
        if self.features is not None or not self.reads_images:
            return ()
        return tuple(self.blank_image().token_types)

    @cached_property
    def one_by_one(self) -> bool:
        """Whether an image has as many tokens among others as alone."""
        if self.features is not None:
            return self.features.one_by_one
        alone, together = (len(self.blank_image(((64, 64),) * count).input_ids) for count in (1, 2))
        return together == 2 * alone

    def _check_images(self, record: Record) -> None:
        if record.images and not self.reads_images:
            raise UserError(
                f"record '{record.id}' has an image, but the model reads text only; take the record out, or set "
                "model.path to a model that reads images"
            )

    def _check_placeholders(self, text: str, record: Record) -> None:
        found = text.count(self.image_token) if self.reads_images else 0
        if found != len(record.images):
            raise UserError(
                f"record '{record.id}': its conversation comes out with {found} '{self.image_token}' for "
                f"{len(record.images)} image(s); either its text contains that token, or the model's chat template "
                "does not write one for every image"
            )

    def _parts(self, record: Record) -> list[Part]:
        """Up to the last answer."""
        self._check_images(record)
        try:
            parts = self.chat.parts(record)
        except UserError as error:
            raise UserError(f"record '{record.id}': {error}") from error
        self._check_placeholders("".join(part.text for part in parts), record)
        return parts

    def _tokenize(self, texts: list[str], images: list[list[Path]]) -> list[_Piece]:
        """Token ids and image inputs of consecutive pieces of one conversation."""
        bos = self.tokenizer.bos_token
        # As `apply_chat_template`: a processor adds the first token where the template has not, a tokenizer adds none.
        special = self.reads_images and not (bos and texts[0].startswith(bos))
        last = self.chat.last_written
        before = list(itertools.accumulate(texts[:-1], lambda written, text: last(written + text), initial=""))
        ids = self.tokenizer([*before, *map(operator.add, before, texts)], add_special_tokens=False)["input_ids"]
        pieces = []
        for index, (text, paths) in enumerate(zip(texts, images, strict=True)):
            known, both = ids[index], _Piece(ids[len(texts) + index])
            if paths or not index:
                both = self._piece(before[index] + text, paths, special and not index)
            if both.ids[: len(known)] == known:
                pieces.append(both.behind(len(known)))
            else:  # a token would span both
                pieces.append(self._piece(text, paths, special=False))
        return pieces

    def _piece(self, text: str, paths: list[Path], special: bool) -> _Piece:
        """Of a text by itself, with its images."""
        if not paths:
            return _Piece(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        if self.features is not None:
            return self._with_features(text, self.features.of(paths), special)
        return self._with_pictures(text, [open_image(path) for path in paths], special)

    def _with_pictures(self, text: str, pictures: list[Image.Image], special: bool = False) -> _Piece:
        # Nested: the images of one text, of which some processors make less than of as many texts.
        out = self.processor(text=[text], images=[pictures], return_tensors="pt", add_special_tokens=special)
        for name, reason in _UNSUPPORTED.items():
            if name in out:
                raise UserError(
                    f"the trainer does not support models with a {type(self.processor).__name__}: {reason}; choose a "
                    "model whose images are tokens and whose attention is the same in training as in generation"
                )
        # Some tokenizers give types of their own, all 0, which models of images know nothing of.
        types = {name: row[0].tolist() for name, row in out.items() if name.endswith(_TOKEN_TYPES) and row.any()}
        inputs = {
            name: value for name, value in out.items() if name not in _TEXT_INPUTS and not name.endswith(_TOKEN_TYPES)
        }
        return _Piece(out["input_ids"][0].tolist(), inputs, types)

    def _with_features(self, text: str, features: list[Tensor], special: bool = False) -> _Piece:
        token, image = self.image_token, self._image_id
        counts = [features_PC.shape[0] for features_PC in features]
        head, *rest = text.split(token)
        for count, tail in zip(counts, rest, strict=True):
            head += token * (count if image is None else 1) + tail
        ids = self.tokenizer(head, add_special_tokens=special)["input_ids"]
        if image is not None:  # repeated here: a tokenizer takes ten times as long for hundreds of them
            start = 0
            for count in counts:
                place = ids.index(image, start)
                ids[place : place + 1] = [image] * count
                start = place + count
        return _Piece(ids, {"pixel_values": join([features_PC[None] for features_PC in features])})

    @cached_property
    def _image_id(self) -> int | None:
        """The token of ``image_token``; None where the tokenizer does not make one of each, whatever is beside it."""
        ids = self.tokenizer(f"a{self.image_token * 2}b", add_special_tokens=False)["input_ids"]
        own = self.tokenizer.convert_tokens_to_ids(self.image_token)
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return own if own in added and ids.count(own) == 2 else None
