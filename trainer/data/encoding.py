"""Conversations to token ids, labels and image inputs, for any processor with a chat template.

A conversation is cut where supervision starts and stops, by rendering the chat template up to each answer, and
every piece is tokenised on its own: exactly the tokens that generation will see as its prompt. Pieces with an
image go through the processor, which expands the placeholder into as many tokens as the image has patches.

Legend: S tokens of one sample, P patches of one image, C feature channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers.utils.chat_template_utils import _compile_jinja_template

from trainer.data.records import IMAGE_PLACEHOLDER, Record, Turn
from trainer.errors import UserError

IGNORE_INDEX = -100
_TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


class TooLongError(UserError):
    """A sample of which nothing useful is left within the limit; names the record."""


class ImageFeatures(Protocol):
    """Features ``[P, C]`` of images by path, used in place of pixels."""

    def __getitem__(self, path: Path) -> Tensor: ...

    def example(self) -> Tensor:
        """Features of some image, for their shape."""


@dataclass
class Encoded:
    """One sample. ``image_inputs`` is what the model's forward takes besides text, stacked over its images."""

    input_ids: list[int]
    labels: list[int]
    image_inputs: dict[str, Tensor] = field(default_factory=dict)
    truncated: bool = False

    @property
    def supervised(self) -> int:
        """Tokens that carry loss; the first position has none before it to predict it."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


class ConversationEncoder:
    """Encodes records for training and prompts for generation.

    Args:
        processor: a transformers processor (or tokenizer) with a chat template.
        max_length: longest sample in tokens; what is past it is cut from the end.
        features: precomputed features of a frozen vision tower, used in place of pixels when given.
    """

    def __init__(self, processor: Any, max_length: int, features: ImageFeatures | None = None) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.max_length = max_length
        self.features = features
        _ = self._chat_template  # complain now, not at the first sample
        self._plain_text = not self.reads_images and not self._template_takes_parts()

    def training_sample(self, record: Record, image_path: Callable[[str], Path]) -> Encoded:
        """Token ids and labels of a whole conversation; only the answers are supervised.

        Raises:
            UserError: an image's tokens do not fit into ``max_length``, or no supervised token is left.
        """
        encoded = Encoded([], [])
        self._check_images(record)
        pieces = self._pieces(record.turns)
        self._check_placeholders("".join(text for text, _ in pieces), record)
        images = iter(record.images)
        used = [[image_path(next(images)) for _ in range(text.count(self.image_token))] for text, _ in pieces]
        tokens = self._tokenize([text for text, _ in pieces], used)
        for (_, supervised), (ids, image_inputs) in zip(pieces, tokens, strict=True):
            if supervised and self.tokenizer.eos_token_id not in ids and not self._ends_turn(ids):
                ids = [*ids, self.tokenizer.eos_token_id]  # a template without an end mark never teaches stopping
            encoded.input_ids += ids
            encoded.labels += ids if supervised else [IGNORE_INDEX] * len(ids)
            for key, value in image_inputs.items():
                held = encoded.image_inputs.get(key)
                encoded.image_inputs[key] = value if held is None else torch.cat([held, value])
            if image_inputs and len(encoded.input_ids) > self.max_length:
                raise TooLongError(
                    f"record '{record.id}': its images and the text around them need {len(encoded.input_ids)} "
                    f"tokens, more than model.max_length = {self.max_length}; raise max_length"
                )
        encoded.truncated = len(encoded.input_ids) > self.max_length
        del encoded.input_ids[self.max_length :], encoded.labels[self.max_length :]
        if not encoded.supervised:
            problem = TooLongError if encoded.truncated else UserError
            remedy = "; raise model.max_length or take the record out" if encoded.truncated else ""
            raise problem(f"record '{record.id}': no supervised token within {self.max_length} tokens{remedy}")
        return encoded

    def prompt(self, record: Record, image_path: Callable[[str], Path]) -> Encoded:
        """The last question of a record, after the turns before it, ready for generation."""
        self._check_images(record)
        (text,) = self._render([self._messages(record.turns)[:-1]], add_generation_prompt=True)
        self._check_placeholders(text, record)
        ((ids, image_inputs),) = self._tokenize([text], [[image_path(image) for image in record.images]])
        return Encoded(ids, [IGNORE_INDEX] * len(ids), image_inputs)

    def blank_image(self) -> Encoded:
        """Tokens and inputs of one black image, for a batch that would otherwise not call the vision tower."""
        if self.features is not None:
            features_PC = torch.zeros_like(self.features.example())
            return self._with_features(self.image_token, [features_PC])
        out = self.processor(
            text=self.image_token, images=[Image.new("RGB", (64, 64))], return_tensors="pt", add_special_tokens=False
        )
        ids = out["input_ids"][0].tolist()
        return Encoded(ids, [IGNORE_INDEX] * len(ids), {k: v for k, v in out.items() if k not in _TEXT_INPUTS})

    @property
    def reads_images(self) -> bool:
        """Whether the model takes images; a tokenizer alone belongs to one that reads text only."""
        return getattr(self.processor, "image_processor", None) is not None

    @property
    def image_token(self) -> str:
        """What stands for an image in rendered text."""
        return getattr(self.processor, "image_token", IMAGE_PLACEHOLDER)

    def _check_images(self, record: Record) -> None:
        if record.images and not self.reads_images:
            raise UserError(
                f"record '{record.id}' has an image, but the model reads text only; take the record out, or set "
                "model.path to a model that reads images"
            )

    def _check_placeholders(self, text: str, record: Record) -> None:
        found = text.count(self.image_token)
        if found != len(record.images):
            raise UserError(
                f"record '{record.id}': its conversation comes out with {found} '{self.image_token}' for "
                f"{len(record.images)} image(s); either its text contains that token, or the model's chat template "
                "does not write one for every image"
            )

    def _pieces(self, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
        """(text, supervised) pairs whose concatenation is the rendered conversation."""
        messages = self._messages(turns)
        asked = self._render([messages[: 2 * n + 1] for n in range(len(turns))], add_generation_prompt=True)
        answered = self._render([messages[: 2 * n + 2] for n in range(len(turns))], add_generation_prompt=False)
        pieces: list[tuple[str, bool]] = []
        done = ""
        for prompt, whole in zip(asked, answered, strict=True):
            if not prompt.startswith(done) or not whole.startswith(prompt):
                raise UserError(
                    "the chat template renders a conversation's beginning differently once it goes on, so answers "
                    "cannot be told from prompts; use a template that only appends"
                )
            pieces += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
            done = whole
        return pieces

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """User and assistant messages in turn, as the chat template takes them."""
        texts = [item for turn in turns for item in (("user", turn.question), ("assistant", turn.answer))]
        if self._plain_text:
            return [{"role": role, "content": text.strip()} for role, text in texts]
        return [_message(role, text) for role, text in texts]

    def _template_takes_parts(self) -> bool:
        """Whether a text model's template reads content as a list of parts; most take a string."""
        try:
            (text,) = self._render([[_message("user", "probe")]], add_generation_prompt=False)
        except (TypeError, TemplateError):
            return False
        return "probe" in text and "'type'" not in text

    def _render(self, conversations: list[list[dict[str, Any]]], add_generation_prompt: bool) -> list[str]:
        # The compiled template itself: `apply_chat_template` copies every message first, which is most of its time.
        render = _compile_jinja_template(self._chat_template).render
        special = self.tokenizer.special_tokens_map
        return [
            render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **special
            )
            for messages in conversations
        ]

    @property
    def _chat_template(self) -> str:
        template = getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise UserError("the model's processor has no chat template; add chat_template.jinja to the model folder")
        return template

    def _tokenize(self, texts: list[str], images: list[list[Path]]) -> list[tuple[list[int], dict[str, Tensor]]]:
        """Token ids and image inputs of consecutive pieces of one conversation."""
        bos = self.tokenizer.bos_token
        special = not (bos and texts[0].startswith(bos))  # a template may write the first token itself
        plain = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        if special and not images[0]:
            plain[0] = self.tokenizer(texts[0])["input_ids"]
        return [
            self._with_images(text, paths, special and index == 0) if paths else (ids, {})
            for index, (text, ids, paths) in enumerate(zip(texts, plain, images, strict=True))
        ]

    def _with_images(self, text: str, paths: list[Path], special: bool) -> tuple[list[int], dict[str, Tensor]]:
        if self.features is not None:
            sample = self._with_features(text, [self.features[path] for path in paths], special)
            return sample.input_ids, sample.image_inputs
        pictures = [Image.open(path).convert("RGB") for path in paths]
        out = self.processor(text=text, images=pictures, return_tensors="pt", add_special_tokens=special)
        return out["input_ids"][0].tolist(), {k: v for k, v in out.items() if k not in _TEXT_INPUTS}

    def _with_features(self, text: str, features: list[Tensor], special: bool = False) -> Encoded:
        token = self.image_token
        head, *rest = text.split(token)
        for features_PC, tail in zip(features, rest, strict=True):
            head += token * features_PC.shape[0] + tail
        ids = self.tokenizer(head, add_special_tokens=special)["input_ids"]
        return Encoded(ids, [IGNORE_INDEX] * len(ids), {"pixel_values": torch.stack(features)})

    def _ends_turn(self, ids: list[int]) -> bool:
        """Whether the piece ends in a special token (``<|im_end|>`` and its like), blanks after it aside."""
        special = set(self.tokenizer.all_special_ids)
        return any(token in special for token in ids[-2:])


def _message(role: str, text: str) -> dict[str, Any]:
    content: list[dict[str, str]] = []
    for index, part in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if index:
            content.append({"type": "image"})
        if part.strip():
            content.append({"type": "text", "text": part.strip()})
    return {"role": role, "content": content}
