"""Chats and instructions as TRL, Axolotl, LLaMA-Factory, ms-swift and OpenAI's fine-tuning take them."""

from __future__ import annotations

from collections.abc import Mapping
from os.path import isabs
from pathlib import Path
from typing import Any

from trainer.data.converters.base import Context, Item, Options, Rejected
from trainer.data.converters.by_path import SplitByPath
from trainer.data.converters.chats import alternating, said
from trainer.data.converters.fields import PARQUET, as_object, get_id, get_text, image_path, shown
from trainer.data.converters.images import write_image
from trainer.data.converters.spellings import messages_of
from trainer.data.raw_json import Element
from trainer.data.records import IMAGE_PLACEHOLDER

_ROLES = {
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip
# What a record has no place for; passed over, a model would be trained on something else than the chat says.
_OF_CHATS = {
    "tools": "descriptions of tools go into the system message, as text",
    "videos": "videos are not supported",
    "audios": "audio is not supported",
    "objects": "put the boxes into the texts",
}
_OF_MESSAGES = {
    "tool_calls": "calls go into 'content', as text",
    "function_call": "calls go into 'content', as text",
    "reasoning_content": "thoughts go into 'content', as the model writes them",
    "audio": "audio is not supported",
}


class Messages(SplitByPath):
    """Texts with images between them: as ``<image>`` and a list of paths beside them, or as parts of a message."""

    name = "messages"
    summary = "chats of role and content (OpenAI, TRL, Axolotl, LLaMA-Factory, ms-swift), and Alpaca's instructions"
    files = (
        "JSON, JSONL or Parquet of {messages: [{role, content}, ...], images: [path, ...]}, {instruction, input, "
        "output} or {prompt, completion}, or a folder, the split in a path"
    )
    suffixes = (".json", ".jsonl", PARQUET)
    what = "file of chats"
    option_names = ("train", "validation", "test", "system")
    rename_duplicates = True

    def options(self, values: Mapping[str, Any], preset: str | None) -> Options:
        return super().options({"system": "keep", **values}, preset)

    def items(self, element: Element, context: Context) -> list[Item]:
        raw = as_object(element.value)
        _refuse(raw, _OF_CHATS, "")
        for key in ("label", "kto_tag"):
            if raw.get(key) is False:
                raise Rejected("not trained on", f"'{key}' is False: the answer is one not to give")
        chat = _Chat(_listed_images(raw))
        for message in messages_of(raw):
            chat.add(message)
        if system := get_text(raw, "system", empty=True) if raw.get("system") is not None else "":
            if chat.system:
                raise Rejected("malformed", "it has 'system' and a system message; keep one of them")
            chat.system = system
        pairs = alternating(chat.turns, "user", "assistant")
        images = tuple(_place(path, context) for path in chat.placed())
        placeholders = sum(question.count(IMAGE_PLACEHOLDER) for question, _ in pairs)
        if images and not placeholders:
            context.notes["image placeholder added"] += 1
            pairs[0] = (f"{IMAGE_PLACEHOLDER}\n" * len(images) + pairs[0][0], pairs[0][1])
        if chat.system and context.options.system == "prepend":
            pairs[0] = (f"{chat.system}\n\n{pairs[0][0]}", pairs[0][1])
        kept = chat.system if context.options.system == "keep" else ""
        # Where images are parts, or the list of them is there and empty, the word is text.
        placed = bool(images) or not (chat.in_parts or raw.get("images") == [])
        name = get_id(raw, "id") if raw.get("id") is not None else self.numbered(element, context)
        return [Item(name, tuple(pairs), images, placed=placed, system=kept)]


class _Chat:
    """The messages of a record so far: their turns, and where images go."""

    def __init__(self, listed: list[str | bytes]) -> None:
        self.listed, self.used = listed, 0
        self.turns: list[tuple[str, str]] = []
        self.system = ""
        self.in_parts = False
        self.images: list[str | bytes] = []

    def add(self, raw: dict[str, Any]) -> None:
        """Adds a message.

        Raises:
            Rejected: it is none, or has what a record has no place for.
        """
        where = f"turn {len(self.turns)}: "
        _refuse(raw, _OF_MESSAGES, where)
        role = get_text(raw, "role" if "role" in raw else "from")
        text = self._text(raw, "content" if "content" in raw else "value", where)
        side = _ROLES.get(role, role)
        for key in ("weight", "loss_weight", "loss", "train") if side == "assistant" else ():
            if raw.get(key) in (0, False):
                raise Rejected("not trained on", f"{where}'{key}' is {raw[key]}, but every answer is trained on")
        before = self.turns[-1] if self.turns else ("", "")
        if side == "system" and not self.turns and not self.system:
            self.system = text.strip()
        elif side == before[0] == "user" and text.strip() and before[1].strip():
            self.turns[-1] = (side, f"{before[1]}\n{text}")  # OpenAI's own example asks in one and shows in the next
        else:
            self.turns.append((side, text))

    def placed(self) -> list[str | bytes]:
        """Paths of the images, or their content, in the order of their places.

        Raises:
            Rejected: images are listed beside parts that have paths of their own.
        """
        if self.images and self.used != len(self.listed):
            raise Rejected("malformed", f"it lists {len(self.listed)} image(s), but its parts use {self.used} of them")
        return self.images or self.listed

    def _text(self, raw: dict[str, Any], key: str, where: str) -> str:
        content = raw.get(key)
        if not isinstance(content, list):
            return said(raw, key)
        self.in_parts = True
        text = ""
        after_image = False
        for value in content:
            part = as_object(value)
            kind = get_text(part, "type")
            if kind == "text":
                own = "text" if part.get("text") is not None or "value" not in part else "value"
                text += "\n" * after_image + said(part, own)
            elif kind in ("image", "image_url"):
                self.images.append(self._path(part, where))
                text += "\n" * bool(text) + IMAGE_PLACEHOLDER
            else:
                raise Rejected("not read", f"{where}parts are of type text, image or image_url, got {shown(kind)}")
            after_image = kind != "text"
        return text

    def _path(self, part: dict[str, Any], where: str) -> str | bytes:
        """Of a part: its own, or the next of the list."""
        places = ("image", "image_url", "path", "url", "value")
        given = next((part[key] for key in places if part.get(key) is not None), None)
        if given is None:
            if part.get("index") not in (None, self.used):
                raise Rejected("not read", f"{where}an image is number {part['index']} of the list, out of order")
            if self.used == len(self.listed):
                raise Rejected("malformed", f"{where}an image has no path, and 'images' lists no more")
            self.used += 1
            return self.listed[self.used - 1]
        given = given.get("url") if isinstance(given, dict) else given
        if not isinstance(given, str):
            raise Rejected("malformed", f"{where}the path of an image must be text, got {shown(given)}")
        return given


def _refuse(raw: dict[str, Any], names: Mapping[str, str], where: str) -> None:
    for key, remedy in names.items():
        if raw.get(key) and raw[key] != "[]":  # none at all, in JSON inside JSON
            raise Rejected("not read", f"{where}'{key}' is not read; {remedy}")


def _listed_images(raw: dict[str, Any]) -> list[str | bytes]:
    """Paths beside the messages, or what is in the files."""
    given = raw.get("images") if raw.get("images") else raw.get("image")
    given = [] if given in (None, "") else given if isinstance(given, list) else [given]
    images: list[str | bytes] = []
    for value in given:
        image = value
        if isinstance(value, dict):  # datasets' own form of an image
            image = value.get("bytes") or value.get("path")
            if isinstance(image, str) and value.get("bytes"):
                image = f"data:;base64,{image}"
        if not isinstance(image, (str, bytes)):
            raise Rejected("malformed", f"'images' must be a list of paths, got one of {shown(image)}")
        images.append(image)
    return images


def _place(path: str | bytes, context: Context) -> str:
    """The path below the image root; an image that is part of the file is written below the output."""
    if isinstance(path, bytes):
        return _embedded(path, context)
    scheme, colon, rest = path.partition(":")
    if colon and scheme.lower() == "data":
        kind, _, encoded = rest.partition(",")
        if not kind.endswith(";base64"):
            raise Rejected("unreadable image", f"image {shown(path)} is not base64")
        return _embedded(encoded, context)
    if colon and scheme.lower() in ("http", "https"):
        raise Rejected("no file", f"image {shown(path)} is an address; save it, and give its path")
    return _below(path.removeprefix("file://"), context.options)


def _embedded(image: str | bytes, context: Context) -> str:
    output = context.output.resolve()
    root = Path(context.options.image_root).resolve() if context.options.image_root else output
    if not output.is_relative_to(root):
        reason = f"an image is part of the file, and {context.output}, where it would be written, is not below {root}"
        raise Rejected("outside the image root", reason)
    return str(output.relative_to(root) / write_image(image, output))


def _below(path: str, options: Options) -> str:
    if not isabs(path):
        return image_path(options.image_folder, path)
    root = Path(options.image_root).absolute() if options.image_root else None
    if root is None or not Path(path).is_relative_to(root):
        where = f"is not below {root}" if root else "is absolute; give the folder of all images as --image-root"
        raise Rejected("outside the image root", f"image path {shown(path)} {where}")
    return image_path("", str(Path(path).relative_to(root)))
