"""Span F1 of extractive question answering: SQuAD 1.1 (Rajpurkar et al., 2016), as XTREME-UP scores its QA."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.metrics.base import MetricResult, check_samples

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def span_tokens(text: str) -> list[str]:
    """Words in lower case without ASCII punctuation and English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def token_f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """F1 of two bags of words, 0 when they share none (two empty ones included, as SQuAD 1.1 does)."""
    common = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0


@dataclass(frozen=True)
class SpanF1:
    """Mean over the samples of the best F1 with one of the references, in percent."""

    name: str = "span_f1"
    label: str = "F1"
    higher_is_better: bool = True

    def compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricResult:
        check_samples(predictions, references)
        return MetricResult.from_samples(
            [
                100.0 * max(token_f1(span_tokens(prediction), span_tokens(answer)) for answer in answers)
                for prediction, answers in zip(predictions, references, strict=True)
            ]
        )
