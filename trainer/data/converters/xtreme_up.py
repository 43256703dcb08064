"""XTREME-UP question answering (Ruder et al., 2023): spans of a passage, in many languages."""

from __future__ import annotations

from pathlib import Path

from trainer.data.converters.base import Context, Converter, Item, Options, Source
from trainer.data.converters.fields import as_object, files_below, get_text, split_of
from trainer.data.raw_json import Element


class XtremeUpQa(Converter):
    """The question reads as the benchmark's own baselines put it: ``question: ... title: ... context: ...``."""

    name = "xtreme-up-qa"
    summary = "XTREME-UP QA, text only"
    files = "JSONL files of question, title, context and target, the split in their path: train/sw.jsonl"
    option_names = ("train", "validation", "test")
    has_images = False

    def sources(self, folder: Path, options: Options) -> list[Source]:
        base = folder if folder.is_dir() else folder.parent
        return [
            Source(path, split_of(path, base), "lines", label=path.relative_to(base).with_suffix("").as_posix())
            for path in files_below(folder, (".jsonl",), "XTREME-UP QA file")
        ]

    def items(self, element: Element, context: Context) -> list[Item]:
        raw = as_object(element.value)
        question = (
            f"question: {get_text(raw, 'question')} title: {get_text(raw, 'title', empty=True)} "
            f"context: {get_text(raw, 'context')}"
        )
        number = element.where.removeprefix("line ")
        return [Item(f"{context.source.label}-{number}", ((question, get_text(raw, "target")),))]
