"""Grounding: boxes in text, intersection over union, accuracy at a threshold."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.metrics.base import MetricResult, check_samples

Box = tuple[float, float, float, float]

# Only plain ASCII decimals: float() alone would also take "1_0", "infinity" and digits of other scripts.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")


def parse_box(text: str) -> Box | None:
    """The box ``[x1, y1, x2, y2]`` in the first pair of brackets of ``text``, None when there is no such box.

    None as well for another count of numbers, anything that is not a finite decimal, and a box without area.
    """
    found = _BRACKETS.search(text)
    if found is None:
        return None
    parts = [part.strip() for part in found.group(1).split(",")]
    if len(parts) != 4 or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    x1, y1, x2, y2 = (float(part) for part in parts)
    if not all(math.isfinite(value) for value in (x1, y1, x2, y2)) or x2 <= x1 or y2 <= y1:
        return None
    return x1, y1, x2, y2


def intersection_over_union(a: Box, b: Box) -> float:
    """Area of the intersection over area of the union of two boxes with x1 < x2 and y1 < y2."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0  # 0 or NaN where coordinates are absurdly small or large


@dataclass(frozen=True)
class AccuracyIoU:
    """Percentage of predicted boxes whose IoU with a reference box is strictly above the threshold.

    A box that is missing or malformed scores 0, in the prediction and in the reference alike: a model's
    output must not stop an evaluation. References are looked at before one (`check_references`).
    """

    threshold: float = 0.5
    name: str = "accuracy_iou"
    label: str = "IoU@0.5"
    higher_is_better: bool = True

    def compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricResult:
        check_samples(predictions, references)
        return MetricResult.from_samples(
            [
                100.0 * any(self.hit(prediction, answer) for answer in answers)
                for prediction, answers in zip(predictions, references, strict=True)
            ]
        )

    def hit(self, prediction: str, reference: str) -> bool:
        predicted, expected = parse_box(prediction), parse_box(reference)
        if predicted is None or expected is None:
            return False
        return intersection_over_union(predicted, expected) > self.threshold
