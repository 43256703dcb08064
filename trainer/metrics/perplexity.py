"""Perplexity from summed losses, as a fused loss returns them (``TaskLoss.task_loss``, ``task_tokens``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.errors import UserError
from trainer.metrics.base import MetricResult


@dataclass(frozen=True)
class Perplexity:
    """The metric under its name in a configuration. It takes losses of the given answers; nothing is generated."""

    name: str = "perplexity"
    label: str = "perplexity"
    higher_is_better: bool = False

    def compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricResult:
        """Raises UserError: answers have no perplexity without a model."""
        raise UserError("perplexity takes losses, not answers: perplexity(loss_sums, tokens)")


def perplexity(loss_sums: Sequence[float], tokens: Sequence[int]) -> MetricResult:
    """exp of the mean loss per token over all samples; every token counts the same, whatever its sample.

    Args:
        loss_sums: per sample, the sum over its supervised tokens of -ln p(token), in nats.
        tokens: per sample, how many supervised tokens that sum has.

    Returns:
        ``value`` the perplexity of the set (inf past the largest float), ``per_sample`` each sample's own, and
        ``influences`` by the delta method for a ratio of sums (NaN where the value is inf).

    Raises:
        UserError: lengths differ, there is no sample, a sample has no token, or a sum is negative or not a number.
    """
    if len(loss_sums) != len(tokens):
        raise UserError(f"loss_sums and tokens differ in length: {len(loss_sums)} against {len(tokens)}")
    if not tokens:
        raise UserError("there are no samples to score; an evaluation set must hold at least one record")
    for index, (loss, count) in enumerate(zip(loss_sums, tokens, strict=True)):
        if count < 1:
            raise UserError(f"tokens[{index}] is {count}; leave out samples without a supervised token")
        if math.isnan(loss) or loss < 0:
            raise UserError(f"loss_sums[{index}] is {loss}; it must be a sum of -ln p, which is never negative")
    n, total = len(tokens), sum(tokens)
    mean = math.fsum(loss_sums) / total
    value = _exp(mean)
    per_sample = [_exp(loss / count) for loss, count in zip(loss_sums, tokens, strict=True)]
    if not math.isfinite(value):
        return MetricResult(value, per_sample, [math.nan] * n)
    scale = value * n / total
    moved = [scale * (loss - mean * count) for loss, count in zip(loss_sums, tokens, strict=True)]
    return MetricResult(value, per_sample, moved)


def _exp(exponent: float) -> float:
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf
