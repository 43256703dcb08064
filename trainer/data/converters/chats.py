"""Data sets that are conversations already: ShareGPT4V, LLaVA's mix-665k, ShareGPT, MFTCoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.data.converters.base import Context, Converter, Item, Options, Pool, Rejected, Source
from trainer.data.converters.by_path import container, dealt
from trainer.data.converters.fields import as_object, files_below, get_id, get_list, get_text, image_path, shown
from trainer.data.raw_json import Element
from trainer.data.records import IMAGE_PLACEHOLDER
from trainer.errors import UserError

_LEAST_CHARACTERS = 16  # of a whole ShareGPT dialogue, as Vicuna's cleaning asks
_RATE_LIMIT = ("Too many requests in 1 hour. Try again later.", "!Too many requests in 1 hour. Try again later.")


class _LlavaFile(Converter):
    """A file in LLaVA's own format, its published name in ``files``; placeholders of images stay where they are.

    A checkout of the published data has other files of the same format beside it, which are other data sets.
    """

    rename_duplicates = True

    def sources(self, folder: Path, options: Options) -> list[Source]:
        found = files_below(folder, (".json", ".jsonl"), "conversation file")
        (path, *more) = [path for path in found if path.name == self.files] or found
        if more:
            names = ", ".join(str(path.relative_to(folder)) for path in (path, *more))
            raise UserError(f"{folder} has several files that may be '{self.name}'; give one as SOURCE: {names}")
        return [Source(path, "train", container(path))]

    def pools(self, options: Options, names: Sequence[str]) -> dict[str, Pool]:
        return {name: dealt(options) for name in names}

    def items(self, element: Element, context: Context) -> list[Item]:
        raw = as_object(element.value)
        image = raw.get("image")
        names = [] if image in (None, "") else image if isinstance(image, list) else [image]
        if not all(isinstance(name, str) for name in names):
            raise Rejected("malformed", f"'image' must be a path or a list of paths, got {shown(image)}")
        images = tuple(image_path(context.options.image_folder, name) for name in names)
        turns = [_message(message) for message in get_list(raw, "conversations")]
        pairs = alternating(turns, "human", "gpt")
        if images and not any(IMAGE_PLACEHOLDER in question for question, _ in pairs):
            context.notes["image placeholder added"] += 1
            pairs[0] = (f"{IMAGE_PLACEHOLDER}\n" * len(images) + pairs[0][0], pairs[0][1])
        return [Item(get_id(raw, "id"), tuple(pairs), images, placed=True)]


def _message(message: Any) -> tuple[str, str]:
    raw = as_object(message)
    return get_text(raw, "from"), said(raw, "value")


def said(raw: dict[str, Any], key: str) -> str:
    """A text as it is: code begins with its indentation."""
    text = get_text(raw, key, empty=True)
    return raw[key] if isinstance(raw[key], str) else text  # a number


def alternating(turns: list[tuple[str, str]], asks: str, answers: str) -> list[tuple[str, str]]:
    """Question-answer pairs of (role, text) turns.

    Raises:
        Rejected: a role besides the two, the wrong order, an odd number, or an empty text.
    """
    if len(turns) < 2:
        raise Rejected("too short", f"{len(turns)} turn(s); a question and an answer are needed")
    for index, (role, text) in enumerate(turns):
        if role not in (asks, answers):
            raise Rejected("other role", f"turn {index} is by {shown(role)}")
        if role != (asks, answers)[index % 2]:
            raise Rejected("not alternating", f"turn {index} is by '{role}'{' once more' if index else ''}")
        if not text.strip():
            raise Rejected("empty text", f"turn {index} is empty")
    if len(turns) % 2:
        raise Rejected("not alternating", "the last turn has no answer")
    texts = [text for _, text in turns]
    return list(zip(texts[::2], texts[1::2], strict=True))


class ShareGpt4V(_LlavaFile):
    """The paper cuts 2,000 captions each for validation and test out of the one file."""

    name = "sharegpt4v"
    summary = "ShareGPT4V captions by GPT-4V"
    files = "sharegpt4v_instruct_gpt4-vision_cap100k.json"
    option_names = ("train", "validation", "test")
    paper = {"validation": 2_000, "test": 2_000}  # noqa: RUF012
    paper_size = 98_000


class Llava665k(_LlavaFile):
    """LLaVA-1.5's mixture: its ids repeat, and 40k of its conversations have no image."""

    name = "llava-mix665k"
    summary = "LLaVA-1.5's instruction mixture, as it is"
    files = "llava_v1_5_mix665k.json"
    option_names = ("train", "validation", "test")


class ShareGpt(Converter):
    """Vicuna's filter (Zheng et al., 2023): leading answers and a trailing question go, other flaws reject."""

    name = "sharegpt"
    summary = "ShareGPT dialogues, text only"
    files = "ShareGPT files in markdown, e.g. ShareGPT_V3_unfiltered_cleaned_split.json"
    option_names = ("train", "validation", "test", "tokenizer", "max_tokens", "blocked_words")
    paper = {"max_tokens": 2048}  # noqa: RUF012
    paper_size = 41_000
    has_images = False
    unique_content = True

    def sources(self, folder: Path, options: Options) -> list[Source]:
        return [
            Source(path, "train", container(path)) for path in files_below(folder, (".json", ".jsonl"), "dialogues")
        ]

    def pools(self, options: Options, names: Sequence[str]) -> dict[str, Pool]:
        return {name: dealt(options) for name in names}

    def items(self, element: Element, context: Context) -> list[Item]:
        raw = as_object(element.value)
        if raw.get("plugins") is not None:
            raise Rejected("plugins", "the dialogue used plugins")
        if raw.get("image") or raw.get("images"):
            raise Rejected("image", "the dialogue is about an image, and 'sharegpt' is of texts only")
        turns = [_message(message) for message in get_list(raw, "conversations")]
        if turns and turns[0][0] == "gpt":
            turns = turns[1:]
        if turns and turns[-1][0] == "human":
            turns = turns[:-1]
        for role, text in turns:
            word = next((word for word in context.options.blocked_words if word.lower() in text.lower()), None)
            if word is not None:
                raise Rejected("blocked word", f"it has '{word}'")
            if role == "gpt" and text.strip().startswith(_RATE_LIMIT):
                raise Rejected("blocked word", "an answer is a rate limit's message")
        pairs = alternating(turns, "human", "gpt")
        if sum(len(text.strip()) for pair in pairs for text in pair) < _LEAST_CHARACTERS:
            raise Rejected("too short", f"fewer than {_LEAST_CHARACTERS} characters")
        if context.options.tokenizer and context.options.max_tokens:
            from trainer.data.converters.lengths import TokenLimit

            limit = context.cache.get("limit")
            if limit is None:
                limit = context.cache["limit"] = TokenLimit(context.options.tokenizer, context.options.max_tokens)
            kept = limit.cut(pairs)
            if kept != pairs:
                context.notes[f"cut at {context.options.max_tokens} tokens"] += 1
            pairs = kept
        return [Item(get_id(raw, "id"), tuple(pairs))]


_CODER_ROLES = {"human": "human", "user": "human", "bot": "gpt", "assistant": "gpt", "gpt": "gpt"}


class MftCoder(Converter):
    """MFTCoder's chat rounds (Liu et al., 2023), the text tasks of the CoBa paper."""

    name = "mftcoder"
    summary = "MFTCoder JSONL of chat rounds, text only"
    files = "one .jsonl file, or a folder of them"
    option_names = ("train", "validation", "test", "system")
    has_images = False

    def sources(self, folder: Path, options: Options) -> list[Source]:
        found = files_below(folder, (".jsonl",), "MFTCoder file")
        base = folder if folder.is_dir() else folder.parent
        return [
            Source(path, "train", "lines", label=path.relative_to(base).with_suffix("").as_posix()) for path in found
        ]

    def pools(self, options: Options, names: Sequence[str]) -> dict[str, Pool]:
        return {name: dealt(options) for name in names}

    def items(self, element: Element, context: Context) -> list[Item]:
        raw = as_object(element.value)
        turns: list[tuple[str, str]] = []
        system = ""
        for index, message in enumerate(get_list(raw, "chat_rounds")):
            entry = as_object(message)
            role = get_text(entry, "role")
            text = said(entry, "content")
            if role == "system" and index == 0:
                system = text.strip()
            else:
                turns.append((_CODER_ROLES.get(role, role), text))
        pairs = alternating(turns, "human", "gpt")
        if system and context.options.system == "prepend":
            pairs[0] = (f"{system}\n\n{pairs[0][0]}", pairs[0][1])
        kept = system if context.options.system == "keep" else ""
        # Ids count from 0 again in every one of its files.
        return [Item(f"{context.source.label}-{element.where.removeprefix('line ')}", tuple(pairs), system=kept)]
