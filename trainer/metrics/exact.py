"""Answers compared as strings: exact match, GQA accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.metrics.base import MetricResult, check_samples


def normalize_answer(text: str) -> str:
    """Strip, lower, drop one trailing "." (exact match of the paper's VQA tasks)."""
    return text.strip().lower().removesuffix(".")


@dataclass(frozen=True)
class ExactMatch:
    """Percentage of predictions equal to one of their references after `normalize_answer`."""

    name: str = "exact_match"
    label: str = "EM"
    higher_is_better: bool = True

    def compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricResult:
        check_samples(predictions, references)
        return MetricResult.from_samples(
            [
                100.0 * (normalize_answer(prediction) in {normalize_answer(answer) for answer in answers})
                for prediction, answers in zip(predictions, references, strict=True)
            ]
        )


@dataclass(frozen=True)
class GqaAccuracy:
    """Percentage of predictions equal to the GQA answer (Hudson and Manning, 2019).

    GQA's scorer compares strings as they are; the usual way to its input (LLaVA-1.5's) lower-cases a prediction and
    drops every trailing "." first, and so does this. References are left alone.
    """

    name: str = "gqa_accuracy"
    label: str = "GQA acc."
    higher_is_better: bool = True

    def compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricResult:
        check_samples(predictions, references)
        return MetricResult.from_samples(
            [
                100.0 * (prediction.rstrip(".").lower() in answers)
                for prediction, answers in zip(predictions, references, strict=True)
            ]
        )
