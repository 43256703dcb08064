"""M3IT (Li et al., 2023): instructions with images inside the rows, as base64."""

from __future__ import annotations

from trainer.data.converters.base import Context, Item, Rejected
from trainer.data.converters.by_path import SplitByPath
from trainer.data.converters.fields import as_object, get_text, shown
from trainer.data.converters.images import write_image
from trainer.data.raw_json import Element


class M3it(SplitByPath):
    """Images are written below ``images`` of the output, named by what is in them."""

    name = "m3it"
    summary = "M3IT rows with embedded images"
    files = "JSONL files of instruction, inputs, image_base64_str and outputs, the split in their path"
    what = "M3IT file"
    has_images = False  # none to look for: they come with the rows

    def items(self, element: Element, context: Context) -> list[Item]:
        raw = as_object(element.value)
        instruction, inputs = get_text(raw, "instruction"), get_text(raw, "inputs", empty=True)
        answer = get_text(raw, "outputs")
        encoded = raw.get("image_base64_str")
        encoded = [encoded] if isinstance(encoded, str) else encoded
        if not isinstance(encoded, list) or not all(isinstance(text, str) for text in encoded):
            raise Rejected("malformed", f"'image_base64_str' must be a list of texts, got {shown(encoded)}")
        images = tuple(write_image(text, context.output) for text in encoded)
        question = f"{instruction}\n{inputs}" if inputs else instruction
        return [Item(self.numbered(element, context), ((question, answer),), images)]
