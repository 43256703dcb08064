"""RefCOCO, RefCOCO+ and RefCOCOg (Kazemzadeh et al., 2014; Mao et al., 2016): region captions and grounding.

The folder holds ``refcoco``, ``refcoco+`` and ``refcocog``, or some of them, each with its pickled references and
COCO's ``instances.json``. One turn is one sentence about one box; test sets keep their names.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.data.converters.base import Context, Converter, Item, Options, Rejected, Side, Source
from trainer.data.converters.fields import as_object, find_file, get_list, get_number, get_text, image_path
from trainer.data.raw_json import Element
from trainer.errors import UserError

_REFERENCES = {
    "refcoco": ("refs(unc).p", "refs(google).p"),
    "refcoco+": ("refs(unc).p",),
    "refcocog": ("refs(umd).p", "refs(google).p"),
}
_SPLITS = {"train": "train", "val": "validation", "test": "test", "testA": "testA", "testB": "testB"}
_OUTSIDE = 1.0  # pixels a box may stick out of its image; COCO's own polygons are rounded


def box_text(box: list[float], width: int, height: int, space: str) -> str:
    """COCO's ``[x, y, w, h]`` in pixels as ``[x1,y1,x2,y2]`` from 0 to 1 with two decimals.

    Args:
        box: left, top, width, height in pixels.
        width: of the image, in pixels.
        height: of the image, in pixels.
        space: ``image``: relative to the image; ``pad``: to the square with the image in its middle, as LLaVA pads
            (the margin before the image is half of what is missing, rounded down to whole pixels).

    Raises:
        Rejected: a box without area, outside the image, or too small to have area at two decimals.
    """
    x, y, w, h = box
    if not (w > 0 and h > 0):
        raise Rejected("wrong box", f"box {box} has no area")
    if x < -_OUTSIDE or y < -_OUTSIDE or x + w > width + _OUTSIDE or y + h > height + _OUTSIDE:
        raise Rejected("wrong box", f"box {box} is not inside its image of {width} x {height} pixels")
    left, top, across, down = 0, 0, width, height
    if space == "pad":
        across = down = max(width, height)
        left, top = (across - width) // 2, (down - height) // 2
    corners = ((x + left) / across, (y + top) / down, (x + w + left) / across, (y + h + top) / down)
    texts = [f"{min(1.0, max(0.0, value)):.2f}" for value in corners]
    if texts[0] == texts[2] or texts[1] == texts[3]:
        raise Rejected("wrong box", f"box {box} has no area at two decimals in an image of {width} x {height}")
    return f"[{','.join(texts)}]"


class _RefCoco(Converter):
    files = "refcoco, refcoco+, refcocog, each with refs(unc|google|umd).p and instances.json"
    option_names = ("merge", "max_turns", "train", "validation", "prompt", "prompt_turns", "boxes", "shared_images")
    paper_size = 41_000

    def sources(self, folder: Path, options: Options) -> list[Source]:
        found: list[Source] = []
        for name, files in _REFERENCES.items():
            place = folder / name if (folder / name).is_dir() else folder if folder.name == name else None
            if place is None:
                continue
            references = find_file(place, files, f"{name} references")
            instances = find_file(place, ["instances.json"], "COCO annotations")
            sides = (Side(instances, "list", "images", "image"), Side(instances, "list", "annotations", "annotation"))
            found.append(Source(references, "", "pickle", None, sides, name))
        if not found:
            raise UserError(f"{folder} has no RefCOCO data: expected {self.files}")
        return found

    def side_rows(self, side: Side, value: Any) -> Iterator[tuple[str, Any]]:
        raw = as_object(value)
        key = str(get_number(raw, "id"))
        if side.name == "image":
            width, height = get_number(raw, "width"), get_number(raw, "height")
            if not width or not height:
                raise Rejected("malformed", f"image {key} is {width} x {height} pixels")
            yield key, [get_text(raw, "file_name"), width, height]
        else:
            yield key, [get_number(raw, "image_id"), raw.get("bbox")]

    def items(self, element: Element, context: Context) -> list[Item]:
        raw = as_object(element.value)
        ref, image_id, split = get_number(raw, "ref_id"), get_number(raw, "image_id"), get_text(raw, "split")
        if split not in _SPLITS:
            raise Rejected("malformed", f"'split' must be one of {', '.join(_SPLITS)}, got {split!r}")
        annotated_image, box = context.lookup("annotation", str(get_number(raw, "ann_id")))
        if annotated_image != image_id:
            raise Rejected("no partner", f"the reference is to image {image_id}, its box to {annotated_image}")
        file_name, width, height = context.lookup("image", str(image_id))
        numbers = box if isinstance(box, list) and len(box) == 4 else [None]
        if not all(_finite(number) for number in numbers):
            raise Rejected("wrong box", f"'bbox' must be four numbers, got {box!r}")
        place = box_text(box, width, height, context.options.boxes)
        image = image_path(context.options.image_folder, file_name)
        written = [get_text(as_object(sentence), "sent", empty=True) for sentence in get_list(raw, "sentences")]
        sentences = [sentence for sentence in written if sentence]
        if not sentences:
            raise Rejected("empty text", "the reference has no sentence")
        if len(sentences) < len(written):
            context.notes["blank sentences"] += len(written) - len(sentences)
        name = context.source.label
        pool = f"{_SPLITS[split]}_{name}" if split.startswith("test") else _SPLITS[split]
        return self._turns(f"{name}-{ref}", sentences, place, image, pool)

    @abstractmethod
    def _turns(self, name: str, sentences: list[str], box: str, image: str, pool: str) -> list[Item]:
        """The items of one reference: its sentences and its box as text."""


def _finite(number: Any) -> bool:
    if isinstance(number, float):
        return math.isfinite(number)
    return isinstance(number, int) and not isinstance(number, bool)  # whatever its size: isfinite cannot take all


class RefCocoCaptions(_RefCoco):
    """A box is asked about, a sentence answers; when scoring, every sentence about the box is a reference."""

    name = "refcoco-caption"
    summary = "RefCOCO/+/g: describe the region in a box"
    paper = {  # noqa: RUF012
        "merge": True, "max_turns": 9, "prompt": "Provide a short description for this region.",
        "prompt_turns": "every", "boxes": "pad",
    }  # fmt: skip

    def _turns(self, name: str, sentences: list[str], box: str, image: str, pool: str) -> list[Item]:
        if pool != "train":
            return [Item(name, ((box, sentences[0]),), (image,), tuple(sentences), image, pool)]
        return [
            Item(f"{name}-{number}", ((box, sentence),), (image,), (), image, pool)
            for number, sentence in enumerate(sentences)
        ]


class RefCocoBoxes(_RefCoco):
    """A sentence is given, its box answers."""

    name = "refcoco-bbox"
    summary = "RefCOCO/+/g: give the box that a sentence describes"
    paper = {  # noqa: RUF012
        "merge": True, "max_turns": 9,
        "prompt": "Provide the bounding box coordinate of the region this sentence describes.",
        "prompt_turns": "every", "boxes": "pad",
    }  # fmt: skip

    def _turns(self, name: str, sentences: list[str], box: str, image: str, pool: str) -> list[Item]:
        return [
            Item(f"{name}-{number}", ((sentence, box),), (image,), (), image, pool)
            for number, sentence in enumerate(sentences)
        ]
