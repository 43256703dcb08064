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
    ``influences`` say how each sample moves ``value``: its change per weight that is put on the sample and taken from
    all alike. For a mean they are ``per_sample`` less the mean; they add up to 0. CIDEr's IDF is taken as given.
    """

    value: float
    per_sample: list[float] = field(repr=False)
    influences: list[float] = field(repr=False)

    @property
    def standard_error(self) -> float:
        """Of ``value``, over the samples, from their ``influences``; for a mean the usual one.

        NaN for a single sample, where nothing is known about the spread, and for an infinite value.
        """
        n = len(self.influences)
        if n == 1:
            return math.nan
        return math.sqrt(math.fsum(moved**2 for moved in self.influences) / (n - 1) / n)

    @classmethod
    def from_samples(cls, per_sample: Sequence[float]) -> MetricResult:
        """Of a metric that is the mean of its samples' scores."""
        mean = math.fsum(per_sample) / len(per_sample)
        return cls(mean, list(per_sample), [score - mean for score in per_sample])


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
