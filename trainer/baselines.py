"""What can be scored without looking at the image: the floor that a trained model has to beat.

Both baselines are fitted on training records only, given as (question, answers) pairs:

- the majority answer: one constant for every record, the constant that does best on the training set;
- question only: the same, but one constant per question text; unseen questions get the global constant.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TypeVar

from trainer.errors import UserError
from trainer.metrics import (
    Bleu,
    BleuOfConstants,
    Cider,
    CiderCorpus,
    Metric,
    MetricResult,
    normalize_answer,
    parse_box,
    process_vqa_answer,
)

Pair = tuple[str, Sequence[str]]
T = TypeVar("T")

# Response-format prompts of the paper's Table 1; they carry nothing that tells one question from another.
FORMAT_INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Provide a short description for this region.",
    "Provide the bounding box coordinate of the region this sentence describes.",
)

# Metrics that compare answers in a form of their own: there the most frequent one is the best constant. VQA accuracy
# could not be computed either, since a training record has one answer and not ten.
_FORMS: dict[str, Callable[[str], str]] = {"exact_match": normalize_answer, "vqa_accuracy": process_vqa_answer}

# Constants tried, and training samples they are tried on: a bound on the time that CIDEr takes. Training captions that
# it looks at at all: one of 180 words takes 0.2 MB.
MAX_CANDIDATES = 48
MAX_SCORED = 2000
MAX_CAPTIONS = 5000

_BOX = re.compile(r"\[[^\[\]]*\]")


def normalize_question(question: str) -> str:
    """The question without ``<image>``, format instructions and boxes, lower-cased, white space collapsed."""
    text = question.replace("<image>", " ")
    for instruction in FORMAT_INSTRUCTIONS:
        text = text.replace(instruction, " ")
    return " ".join(_BOX.sub(" ", text).lower().split())


class ConstantAnswers:
    """The constant answer that scores best on any part of a training set, by the task's own metric."""

    def __init__(self, train: Sequence[Pair], metric: Metric) -> None:
        if not train:
            raise UserError("a baseline needs at least one training record")
        self.train = _spread(train, MAX_CAPTIONS) if isinstance(metric, Cider) else train
        self.answers = _answers(self.train)
        self.metric = metric
        self._captions = CiderCorpus(self.answers, metric.tokenize) if isinstance(metric, Cider) else None

    @cached_property
    def overall(self) -> str:
        """The best constant of the whole training set."""
        return self.best(range(len(self.train)))

    def majority(self, evaluation: Sequence[Pair]) -> MetricResult:
        """Score on ``evaluation`` of answering every question with the best constant of the training set."""
        return self.metric.compute([self.overall] * len(evaluation), _answers(evaluation))

    def question_only(self, evaluation: Sequence[Pair]) -> MetricResult:
        """Score on ``evaluation`` of the best constant among the training records with the same question text."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, (question, _) in enumerate(self.train):
            groups[normalize_question(question)].append(index)
        questions = [normalize_question(question) for question, _ in evaluation]
        answer = {question: self.best(groups[question]) for question in set(questions) & groups.keys()}
        predictions = [answer.get(question, self.overall) for question in questions]
        return self.metric.compute(predictions, _answers(evaluation))

    def best(self, samples: Sequence[int]) -> str:
        """The constant with the best score on these training records; ties go to the more frequent one."""
        frequent = self._by_frequency(samples)
        if self.metric.name in _FORMS:
            return frequent[0]
        if self.metric.name == "accuracy_iou":
            candidates = [*self._median_box(samples), frequent[0]]
        else:
            # Where most captions are unique the frequent ones are arbitrary: look across the rest as well.
            half = MAX_CANDIDATES // 2
            candidates = frequent[:half] + _spread(frequent[half:], half)
        return max(candidates, key=self._score_on(_spread(samples, MAX_SCORED)))

    def _score_on(self, samples: Sequence[int]) -> Callable[[str], float]:
        """How good a constant is for these training records."""
        references = [self.answers[sample] for sample in samples]
        if (captions := self._captions) is not None:
            return lambda candidate: sum(captions.score(candidate, samples))
        if isinstance(self.metric, Bleu):
            return BleuOfConstants(references).score
        sign = 1 if self.metric.higher_is_better else -1
        return lambda candidate: sign * self.metric.compute([candidate] * len(references), references).value

    def _by_frequency(self, samples: Iterable[int]) -> list[str]:
        """Distinct answers, most frequent first, then in order of appearance; spelled as first seen."""
        form = _FORMS.get(self.metric.name, str)
        spelling: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for sample in samples:
            for answer in self.answers[sample]:
                key = form(answer)
                spelling.setdefault(key, answer)
                counts[key] += 1
        return [spelling[key] for key, _ in counts.most_common()]

    def _median_box(self, samples: Iterable[int]) -> list[str]:
        """The coordinate-wise median of the boxes, when there is a readable box at all."""
        parsed = [parse_box(answer) for sample in samples for answer in self.answers[sample]]
        boxes = [box for box in parsed if box is not None]
        if not boxes:
            return []
        return ["[" + ",".join(f"{statistics.median(side):.6g}" for side in zip(*boxes, strict=True)) + "]"]


def _answers(pairs: Sequence[Pair]) -> list[list[str]]:
    """Without blanks at their ends, which count in no model's score either."""
    return [[answer.strip() for answer in answers] for _, answers in pairs]


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]
