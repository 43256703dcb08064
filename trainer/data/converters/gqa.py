"""GQA (Hudson and Manning, 2019): the balanced question files."""

from __future__ import annotations

from pathlib import Path

from trainer.data.converters.base import ONE_WORD, Context, Converter, Item, Options, Rejected, Source
from trainer.data.converters.fields import as_object, get_id, get_text, image_path
from trainer.data.raw_json import Element
from trainer.errors import UserError

_FILES = {
    "train": ("train_balanced_questions.json",),
    "validation": ("val_balanced_questions.json",),
    "test": ("testdev_balanced_questions.json",),
}


class Gqa(Converter):
    """Training questions of an image in one conversation; test is the balanced test-dev split."""

    name = "gqa"
    summary = "GQA balanced questions with their short answers"
    files = "{train,val,testdev}_balanced_questions.json"
    option_names = ("merge", "max_turns", "train", "validation", "test", "prompt", "prompt_turns")
    paper = {"merge": True, "prompt": ONE_WORD, "validation": 20_000}  # noqa: RUF012
    paper_size = 72_000

    def sources(self, folder: Path, options: Options) -> list[Source]:
        found = [
            Source(folder / name, pool, "object")
            for pool, names in _FILES.items()
            for name in names
            if (folder / name).is_file()
        ]
        if not found:
            raise UserError(f"{folder} has no GQA questions: expected {self.files}")
        return found

    def items(self, element: Element, context: Context) -> list[Item]:
        raw = as_object(element.value)
        if not element.key:
            raise Rejected("malformed", "the question has no id")
        balanced = raw.get("isBalanced", True)
        if not isinstance(balanced, bool):
            raise Rejected("malformed", f"'isBalanced' must be true or false, got {balanced!r}")
        if not balanced:
            context.notes["not balanced"] += 1
            return []
        image = image_path(context.options.image_folder, f"{get_id(raw, 'imageId')}.jpg")
        turn = (get_text(raw, "question"), get_text(raw, "answer"))
        return [Item(element.key, (turn,), (image,), (), image)]
