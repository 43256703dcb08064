"""What every metric returns and accepts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from trainer.errors import UserError


@dataclass(frozen=True)
class MetricResult:
    """Value of a metric on a set of samples, in the units of ``per_sample``.

    ``value`` is the mean of ``per_sample``, except for metrics of the whole set (BLEU, perplexity).
    ``influences`` say how each sample moves ``value``: its change per weight that is put on the sample and taken from
    all alike. For a mean they are ``per_sample`` less the mean; they add up to 0. CIDEr's IDF is taken as given.
    ``most`` is what a sample scores at most, and 0 at least; None where that is not known.
    """

    value: float
    per_sample: list[float] = field(repr=False)
    influences: list[float] = field(repr=False)
    most: float | None = None

    @property
    def standard_error(self) -> float:
        """Of ``value``, over the samples, from their ``influences``; for a mean the usual one.

        NaN for a single sample, where nothing is known about the spread, and for an infinite value.
        """
        n = len(self.influences)
        if n == 1:
            return math.nan
        return self.unseen or math.sqrt(math.fsum(moved**2 for moved in self.influences) / (n - 1) / n)

    @property
    def unseen(self) -> float:
        """The standard error where every sample scores 0, or every one ``most``; else 0.

        Samples that are all alike have no spread, and yet others may be otherwise. Twice this error reaches from the
        end of the scale as far as two standard errors of Wilson's interval do (Wilson, 1927): 4 / (n + 4) of it.
        """
        if self.most is None or self.value not in (0.0, self.most):
            return 0.0
        return 2 * self.most / (len(self.influences) + 4)

    def of_groups(self, groups: Sequence[Hashable]) -> MetricResult:
        """The result with groups of samples, such as the questions about an image, in place of samples that count as
        independent: a group's influences add up (the cluster-robust error; Liang and Zeger, 1986).

        Args:
            groups: of each sample. None is a group of its own.
        """
        sums: defaultdict[Hashable, float] = defaultdict(float)
        for number, (group, moved) in enumerate(zip(groups, self.influences, strict=True)):
            sums[(number,) if group is None else group] += moved
        share = len(sums) / len(self.influences)  # their mean is that of the samples
        return replace(self, influences=[moved * share for moved in sums.values()])

    @classmethod
    def from_samples(cls, per_sample: Sequence[float], most: float = 100.0) -> MetricResult:
        """Of a metric that is the mean of its samples' scores, which are 0 at least and `most` at most."""
        mean = math.fsum(per_sample) / len(per_sample)
        return cls(mean, list(per_sample), [score - mean for score in per_sample], most)


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
