"""ChartQA accuracy, strict and relaxed (Masry et al., 2022, section 5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.metrics.base import MetricResult, check_samples


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def within_tolerance(prediction: str, answer: str, tolerance: float) -> bool:
    """Whether a number is within `tolerance` of the answer, relatively, or a text equals it but for case.

    As in Pix2Struct's scorer, which the community reports: "12%" is 0.12, and an answer of zero, having no relative
    error, is compared as text.
    """
    predicted, expected = _number(prediction), _number(answer)
    if predicted is not None and expected:
        return abs(predicted - expected) / abs(expected) <= tolerance
    return prediction.lower() == answer.lower()


@dataclass(frozen=True)
class ChartAccuracy:
    """Percentage of predictions that are correct for one of their references.

    ``tolerance`` None is the strict variant: the strings are equal as they are.
    """

    tolerance: float | None
    name: str
    label: str
    higher_is_better: bool = True

    def compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricResult:
        check_samples(predictions, references)
        return MetricResult.from_samples(
            [
                100.0 * any(self._correct(prediction, answer) for answer in answers)
                for prediction, answers in zip(predictions, references, strict=True)
            ]
        )

    def _correct(self, prediction: str, answer: str) -> bool:
        if self.tolerance is None:
            return prediction == answer
        return within_tolerance(prediction, answer, self.tolerance)
