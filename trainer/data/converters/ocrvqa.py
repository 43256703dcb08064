"""OCR-VQA (Mishra et al., 2019): questions about book covers."""

from __future__ import annotations

import re
from os.path import isfile, join
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from trainer.data.converters.base import ONE_WORD, Context, Converter, Item, Options, Rejected, Source
from trainer.data.converters.fields import as_object, find_file, get_list, get_number, get_text, image_path
from trainer.data.raw_json import Element

_SPLITS = {1: "train", 2: "validation", 3: "test"}
_EXTENSION = re.compile(r"\.[A-Za-z0-9]{1,5}")


class OcrVqa(Converter):
    """All splits are in the one file; an image is the book's id with the extension of its URL."""

    name = "ocrvqa"
    summary = "OCR-VQA questions about book covers"
    files = "dataset.json"
    option_names = ("merge", "max_turns", "train", "validation", "test", "prompt", "prompt_turns")
    paper = {"merge": True, "prompt": ONE_WORD, "train": 80_000, "validation": 20_000}  # noqa: RUF012
    paper_size = 80_000

    def sources(self, folder: Path, options: Options) -> list[Source]:
        path = folder if folder.is_file() else find_file(folder, ["dataset.json"], "OCR-VQA questions")
        return [Source(path, "", "object")]

    def items(self, element: Element, context: Context) -> list[Item]:
        raw = as_object(element.value)
        if not element.key:
            raise Rejected("malformed", "the book has no id")
        pool = _SPLITS.get(get_number(raw, "split"))
        if pool is None:
            raise Rejected("malformed", f"'split' must be 1, 2 or 3, got {raw['split']}")
        extension = PurePosixPath(_url_path(get_text(raw, "imageURL"))).suffix
        if not _EXTENSION.fullmatch(extension):
            raise Rejected("malformed", f"'imageURL' has no file extension: {raw['imageURL']!r}")
        image = image_path(context.options.image_folder, element.key + extension)
        root, jpg = context.options.image_root, str(PurePosixPath(image).with_suffix(".jpg"))
        if root and not isfile(join(root, image)) and isfile(join(root, jpg)):
            image = jpg  # the images are passed on as LLaVA has them, with GIFs under this name
        questions, answers = get_list(raw, "questions"), get_list(raw, "answers")
        if len(questions) != len(answers) or not questions:
            raise Rejected("malformed", f"{len(questions)} question(s) but {len(answers)} answer(s)")
        pairs = [
            (
                get_text({"question": question}, "question", empty=True),
                get_text({"answer": answer}, "answer", empty=True),
            )
            for question, answer in zip(questions, answers, strict=True)
        ]
        whole = {number: pair for number, pair in enumerate(pairs) if all(pair)}
        if not whole:
            raise Rejected("empty text", f"of {len(pairs)} question(s) each is blank, or its answer")
        if len(whole) < len(pairs):
            context.notes["blank questions or answers"] += len(pairs) - len(whole)
        return [Item(f"{element.key}-{number}", (pair,), (image,), (), image, pool) for number, pair in whole.items()]


def _url_path(url: str) -> str:
    try:
        return urlsplit(url).path
    except ValueError as error:
        raise Rejected("malformed", f"'imageURL' is not a URL: {error}") from error
