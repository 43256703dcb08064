"""M3IT (Li et al., 2023): instructions with images inside the rows, as base64."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
from pathlib import Path

from trainer.data.converters.base import Context, Converter, Item, Options, Rejected, Source
from trainer.data.converters.fields import as_object, files_below, get_text, shown, split_of
from trainer.data.converters.images import check_header
from trainer.data.raw_json import Element


class M3it(Converter):
    """Images are written below ``images`` of the output, named by what is in them."""

    name = "m3it"
    summary = "M3IT rows with embedded images"
    files = "JSONL files of instruction, inputs, image_base64_str and outputs, the split in their path"
    option_names = ("train", "validation", "test")
    has_images = False  # none to look for: they come with the rows

    def sources(self, folder: Path, options: Options) -> list[Source]:
        base = folder if folder.is_dir() else folder.parent
        return [
            Source(path, split_of(path, base), "lines", label=path.relative_to(base).with_suffix("").as_posix())
            for path in files_below(folder, (".jsonl",), "M3IT file")
        ]

    def items(self, element: Element, context: Context) -> list[Item]:
        raw = as_object(element.value)
        instruction, inputs = get_text(raw, "instruction"), get_text(raw, "inputs", empty=True)
        answer = get_text(raw, "outputs")
        encoded = raw.get("image_base64_str")
        encoded = [encoded] if isinstance(encoded, str) else encoded
        if not isinstance(encoded, list) or not all(isinstance(text, str) for text in encoded):
            raise Rejected("malformed", f"'image_base64_str' must be a list of texts, got {shown(encoded)}")
        images = tuple(_write_image(text, context.output) for text in encoded)
        question = f"{instruction}\n{inputs}" if inputs else instruction
        number = element.where.removeprefix("line ")
        return [Item(f"{context.source.label}-{number}", ((question, answer),), images)]


def _write_image(encoded: str, output: Path) -> str:
    """Path below `output` of an image, written if it is not there yet."""
    try:
        content = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Rejected("unreadable image", f"not base64: {error}") from error
    kind = check_header(io.BytesIO(content))
    digest = hashlib.sha256(content).hexdigest()
    name = f"images/{digest[:2]}/{digest}.{kind.lower()}"
    path = output / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two workers may meet the same image
        partial.write_bytes(content)
        partial.replace(path)
    return name
