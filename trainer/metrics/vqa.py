"""VQAv2 accuracy as its evaluation server computes it (Goyal et al., 2017; visualqa.org/evaluation).

Answers are processed the way the published scorer really does, not the way its page describes:

- Punctuation is deleted when it has a blank beside it anywhere in the answer, or when the answer has a comma
  between two digits anywhere; otherwise every occurrence becomes a blank.
- A "." is deleted unless a digit follows ("3." loses it, ".5" keeps it), and only the first 32 of them, because a
  flag is passed where the number of replacements belongs.
- "none" is the number 0, and "somebody'd" loses its apostrophe where every other contraction gains one.

Its script compares questions whose ten answers are all the same without any processing, so that "Yes" is wrong where
everybody said "yes". But predictions are processed before they are handed in (LLaVA, lmms-eval): reported numbers have
that done. Here both sides always are, which scores at least what the script gives to an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from trainer.errors import UserError
from trainer.metrics.base import MetricResult, check_samples

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile("[0-9],[0-9]")
_PERIOD = re.compile(r"\.(?![0-9])")
_MOST_PERIODS = 32
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# Spelled with exactly one apostrophe missing, a contraction gets it back.
_CONTRACTIONS = {
    form[:place] + form[place + 1 :]: form
    for form in _CONTRACTED.split()
    for place, character in enumerate(form)
    if character == "'"
} | {"somebody'd": "somebodyd"}


@lru_cache(2**15)  # annotators agree, and questions share answers
def process_vqa_answer(text: str) -> str:
    """An answer in the form VQAv2 compares: punctuation, number words, articles, contractions, lower case."""
    delete_all = _DIGIT_COMMA.search(text) is not None
    processed = text
    for mark in _PUNCTUATION:
        deleted = delete_all or f"{mark} " in text or f" {mark}" in text
        processed = processed.replace(mark, "" if deleted else " ")
    processed = _PERIOD.sub("", processed, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in processed.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, matches among the other annotators / 3), in [0, 1]."""
    prediction, *answers = (process_vqa_answer(_one_line(text)) for text in (prediction, *answers))
    matches = sum(answer == prediction for answer in answers)
    agreeing = matches * min(1.0, (matches - 1) / 3)
    others = (len(answers) - matches) * min(1.0, matches / 3)
    return (agreeing + others) / len(answers)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@dataclass(frozen=True)
class VqaAccuracy:
    """VQAv2 accuracy in percent. The references of a sample are its annotators' answers, ten in VQAv2."""

    name: str = "vqa_accuracy"
    label: str = "VQA acc."
    higher_is_better: bool = True

    def compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricResult:
        check_samples(predictions, references)
        for index, answers in enumerate(references):
            if len(answers) < 2:
                raise UserError(
                    f"references[{index}] has one answer; VQA accuracy compares annotators with each other and needs "
                    "all of theirs (VQAv2 has ten). Score single answers with 'exact_match'"
                )
        return MetricResult.from_samples(
            [
                100.0 * vqa_score(prediction, answers)
                for prediction, answers in zip(predictions, references, strict=True)
            ]
        )
