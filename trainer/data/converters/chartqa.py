"""ChartQA (Masry et al., 2022): questions written by people and made from summaries."""

from __future__ import annotations

from pathlib import Path

from trainer.data.converters.base import ONE_WORD, Context, Converter, Item, Options, Source
from trainer.data.converters.fields import as_object, get_text, image_path
from trainer.data.raw_json import Element
from trainer.errors import UserError

_SPLITS = {"train": "train", "validation": "val", "test": "test"}


class ChartQa(Converter):
    """Training questions of a chart in one conversation, whichever file they come from."""

    name = "chartqa"
    summary = "ChartQA questions, human and augmented"
    files = "{train,val,test}/{split}_human.json and {split}_augmented.json (images in {split}/png)"
    option_names = ("merge", "max_turns", "train", "validation", "test", "prompt", "prompt_turns")
    paper = {"merge": True, "prompt": ONE_WORD}  # noqa: RUF012
    paper_size = 18_000

    def sources(self, folder: Path, options: Options) -> list[Source]:
        found = [
            Source(path, pool, "list", label=f"{split}-{kind}")
            for pool, split in _SPLITS.items()
            for kind in ("human", "augmented")
            if (path := folder / split / f"{split}_{kind}.json").is_file()
        ]
        if not found:
            raise UserError(f"{folder} has no ChartQA questions: expected {self.files}")
        return found

    def items(self, element: Element, context: Context) -> list[Item]:
        raw = as_object(element.value)
        split = _SPLITS[context.source.pool]
        name = image_path("", get_text(raw, "imgname"))
        image = image_path(context.options.image_folder, f"{split}/png/{name}")
        turn = (get_text(raw, "query"), get_text(raw, "label"))
        number = element.where.removeprefix("record ")
        return [Item(f"{context.source.label}-{number}", (turn,), (image,), (), image)]
