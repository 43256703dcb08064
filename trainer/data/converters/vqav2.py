"""VQAv2 (Goyal et al., 2017): question files and annotation files of the COCO 2014 images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.data.converters.base import ONE_WORD, Context, Converter, Item, Options, Rejected, Side, Source
from trainer.data.converters.fields import as_object, find_file, get_id, get_list, get_number, get_text, image_path
from trainer.data.raw_json import Element
from trainer.errors import UserError

_ANNOTATORS = 10
_YEARS = {"train": "train2014", "validation": "val2014"}
_UNANSWERED = ("test-dev2015", "test2015")  # the first is part of the second


class Vqav2(Converter):
    """Training questions of an image in one conversation; validation and test questions one by one."""

    name = "vqav2"
    summary = "VQAv2 questions, with the answers of ten annotators as references"
    files = (
        "v2_OpenEnded_mscoco_{train,val}2014_questions.json and v2_mscoco_{train,val}2014_annotations.json; "
        "v2_OpenEnded_mscoco_{test-dev,test}2015_questions.json, which have no answers"
    )
    option_names = ("merge", "max_turns", "train", "validation", "prompt", "prompt_turns", "references")
    # The authors' exact match compares with one answer; any of ten would be another, higher number.
    paper = {"merge": True, "prompt": ONE_WORD, "validation": 20_000, "references": "consensus"}  # noqa: RUF012
    paper_size = 83_000

    def sources(self, folder: Path, options: Options) -> list[Source]:
        found: list[Source] = []
        for pool, year in _YEARS.items():
            questions = folder / f"v2_OpenEnded_mscoco_{year}_questions.json"
            if questions.is_file():
                answers = find_file(folder, [f"v2_mscoco_{year}_annotations.json"], f"answers to {questions.name}")
                side = Side(answers, "list", "annotations", "annotation")
                found.append(Source(questions, pool, "list", "questions", (side,), year))
        for name in _UNANSWERED:
            questions = folder / f"v2_OpenEnded_mscoco_{name}_questions.json"
            if questions.is_file():
                found.append(Source(questions, name, "list", "questions", (), "test2015"))
                break
        if not found:
            raise UserError(f"{folder} has no VQAv2 questions: expected {self.files}")
        return found

    def side_rows(self, side: Side, value: Any) -> Iterator[tuple[str, Any]]:
        raw = as_object(value)
        answers = [get_text(as_object(answer), "answer", empty=True) for answer in get_list(raw, "answers")]
        if len(answers) != _ANNOTATORS:
            raise Rejected("malformed", f"'answers' must be of {_ANNOTATORS} annotators, got {len(answers)}")
        # The published consensus is kept: it breaks ties between answers in a way of its own.
        consensus = get_text(raw, "multiple_choice_answer")
        yield get_id(raw, "question_id"), [get_number(raw, "image_id"), consensus, answers]

    def items(self, element: Element, context: Context) -> list[Item]:
        raw = as_object(element.value)
        question_id, image_id = get_id(raw, "question_id"), get_number(raw, "image_id")
        question = get_text(raw, "question")
        year = context.source.label
        image = image_path(context.options.image_folder or year, f"COCO_{year}_{image_id:012d}.jpg")
        if context.source.pool in _UNANSWERED:
            return [Item(question_id, ((question, ""),), (image,))]
        answered_image, consensus, answers = context.lookup("annotation", question_id)
        if answered_image != image_id:
            raise Rejected("no partner", f"the question is about image {image_id}, its answers about {answered_image}")
        references = tuple(answers) if context.options.references == "all" else (consensus,)
        if context.source.pool == "train":
            references = ()
        elif Counter(answers).most_common(1)[0][1] == 1:
            context.notes["questions without two annotators who agree"] += 1
        return [Item(question_id, ((question, consensus),), (image,), references, image)]
