"""XTREME-UP question answering (Ruder et al., 2023): spans of a passage, in many languages."""

from __future__ import annotations

from trainer.data.converters.base import Context, Item
from trainer.data.converters.by_path import SplitByPath
from trainer.data.converters.fields import as_object, get_text
from trainer.data.raw_json import Element


class XtremeUpQa(SplitByPath):
    """The question reads as the benchmark's own baselines put it: ``question: ... title: ... context: ...``."""

    name = "xtreme-up-qa"
    summary = "XTREME-UP QA, text only"
    files = "JSONL files of question, title, context and target, the split in their path: train/sw.jsonl"
    what = "XTREME-UP QA file"
    has_images = False

    def items(self, element: Element, context: Context) -> list[Item]:
        raw = as_object(element.value)
        question = (
            f"question: {get_text(raw, 'question')} title: {get_text(raw, 'title', empty=True)} "
            f"context: {get_text(raw, 'context')}"
        )
        return [Item(self.numbered(element, context), ((question, get_text(raw, "target")),))]
