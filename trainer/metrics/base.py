"""What every metric returns and accepts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from trainer.errors import UserError


@dataclass(frozen=True)
class MetricResult:
    """Value of a metric on a set of samples, in the units of ``per_sample``.

    ``value`` is the mean of ``per_sample``, except for metrics of the whole set (BLEU, perplexity).
    ``standard_error`` is the sample standard deviation of ``per_sample`` over sqrt(n). It is NaN for a
    single sample, where nothing is known about the spread. For CIDEr the IDF is taken as given.
    """

    value: float
    per_sample: list[float] = field(repr=False)
    standard_error: float

    @classmethod
    def from_samples(cls, per_sample: Sequence[float]) -> MetricResult:
        n = len(per_sample)
        mean = math.fsum(per_sample) / n
        if n == 1:
            return cls(mean, list(per_sample), math.nan)
        variance = math.fsum((score - mean) ** 2 for score in per_sample) / (n - 1)
        return cls(mean, list(per_sample), math.sqrt(variance / n))


class Metric(Protocol):
    """What the registry holds."""

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> str: ...

    @property
    def higher_is_better(self) -> bool: ...

    def compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricResult: ...


def check_samples(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise UserError(f"predictions and references differ in length: {len(predictions)} against {len(references)}")
    if not predictions:
        raise UserError("there are no samples to score; an evaluation set must hold at least one record")
    for index, answers in enumerate(references):
        # A bare string is a sequence of characters and would be scored letter by letter.
        if isinstance(answers, str) or not answers:
            raise UserError(f"references[{index}] must be a non-empty list of strings, got {answers!r}")
