"""BLEU of a corpus (Papineni et al., 2002) with sacrebleu's defaults: tokens of mteval 13a, 4-grams, case kept.

The signature is ``case:mixed|eff:no|tok:13a|smooth:exp``: an order without a match counts as half, then a quarter,
an eighth... of a match (Chen and Cherry, 2014, method 3).
"""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.metrics.base import MetricResult, check_samples

Ngram = tuple[str, ...]
ORDERS = 4
_ENTITIES = ("&quot;", "&amp;", "&lt;", "&gt;")  # one after the other: "&amp;lt;" ends as "<"
# 13a sets these ASCII symbols apart; "." and "," unless both neighbours are digits; "-" after a digit.
_SYMBOL = re.compile(r"([!-&(-+/:-@\[-`{-~])")
_POINT_AFTER_WORD = re.compile(r"([^0-9])([.,])")
_POINT_BEFORE_WORD = re.compile(r"([.,])([^0-9])")
_DASH_AFTER_DIGIT = re.compile(r"([0-9])-")


def tokenize_13a(text: str) -> list[str]:
    """Tokens of the WMT scorer mteval-v13a."""
    text = text.replace("<skipped>", "").replace("-\n", "")
    for entity in _ENTITIES:
        text = text.replace(entity, html.unescape(entity))
    text = _SYMBOL.sub(r" \1 ", f" {text} ")
    text = _POINT_AFTER_WORD.sub(r"\1 \2 ", text)
    text = _POINT_BEFORE_WORD.sub(r" \1 \2", text)
    return _DASH_AFTER_DIGIT.sub(r"\1 - ", text).split()


@dataclass(frozen=True)
class _Counts:
    """What BLEU adds up: lengths in tokens, matching and all n-grams per order."""

    length: int
    reference_length: int
    matches: tuple[int, ...]
    totals: tuple[int, ...]

    def __add__(self, other: _Counts) -> _Counts:
        return self._combine(other, 1)

    def __sub__(self, other: _Counts) -> _Counts:
        return self._combine(other, -1)

    def _combine(self, other: _Counts, sign: int) -> _Counts:
        return _Counts(
            self.length + sign * other.length,
            self.reference_length + sign * other.reference_length,
            tuple(a + sign * b for a, b in zip(self.matches, other.matches, strict=True)),
            tuple(a + sign * b for a, b in zip(self.totals, other.totals, strict=True)),
        )


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    return Counter(
        tuple(words[start : start + order]) for order in range(1, ORDERS + 1) for start in range(len(words) - order + 1)
    )


def _most(tokenized: Sequence[Sequence[str]]) -> Counter[Ngram]:
    """How often an n-gram is in the reference that has it most often."""
    most: Counter[Ngram] = Counter()
    for reference in tokenized:
        most |= _ngrams(reference)
    return most


def _nearest(lengths: Sequence[int], length: int) -> int:
    """The reference nearest in length counts for brevity, the shorter of two that are as near."""
    return min((abs(reference - length), reference) for reference in lengths)[1]


def _totals(words: Sequence[str]) -> tuple[int, ...]:
    return tuple(max(len(words) - order, 0) for order in range(ORDERS))


def _count(prediction: str, references: Sequence[str]) -> _Counts:
    words = tokenize_13a(prediction)
    tokenized = [tokenize_13a(reference) for reference in references]
    found = _ngrams(words) & _most(tokenized)
    matches = [0] * ORDERS
    for ngram, count in found.items():
        matches[len(ngram) - 1] += count
    return _Counts(len(words), _nearest(list(map(len, tokenized)), len(words)), tuple(matches), _totals(words))


class BleuOfConstants:
    """Corpus BLEU of the same prediction for all samples, for one prediction after the other.

    Args:
        references: of each sample. Their n-grams are counted once.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._lengths: list[list[int]] = []
        self._samples: list[Counter[Ngram]] = []  # [k]: how many samples have an n-gram more than k times
        for answers in references:
            tokenized = [tokenize_13a(answer) for answer in answers]
            self._lengths.append([len(words) for words in tokenized])
            for ngram, most in _most(tokenized).items():
                self._samples += [Counter() for _ in range(most - len(self._samples))]
                for times in range(most):
                    self._samples[times][ngram] += 1

    def score(self, prediction: str) -> float:
        """What :class:`Bleu` finds for it in all samples."""
        words = tokenize_13a(prediction)
        matches = [0] * ORDERS
        for ngram, count in _ngrams(words).items():
            matches[len(ngram) - 1] += sum(found[ngram] for found in self._samples[:count])
        nearest = sum(_nearest(lengths, len(words)) for lengths in self._lengths)
        n = len(self._lengths)
        totals = tuple(n * total for total in _totals(words))
        return _bleu(_Counts(n * len(words), nearest, tuple(matches), totals), every_order=True)


def _bleu(counts: _Counts, every_order: bool) -> float:
    """BLEU in percent; with `every_order` false, orders that the prediction is too short for are left out."""
    if not any(counts.matches):
        return 0.0
    logs: list[float] = []
    smoothing = 1.0
    for match, total in zip(counts.matches, counts.totals, strict=True):
        if total == 0:
            if every_order:
                return 0.0
            break
        if match == 0:
            smoothing /= 2
        logs.append(math.log((match or smoothing) / total))
    brevity = min(0.0, 1 - counts.reference_length / counts.length)
    return 100.0 * math.exp(brevity + math.fsum(logs) / len(logs))


@dataclass(frozen=True)
class Bleu:
    """Corpus BLEU in percent: counts are added over the set before precisions are taken.

    ``per_sample`` are sentence scores (orders that a short sentence lacks are left out), whose mean is another
    number; ``influences`` and the standard error are the jackknife's, leaving out one sample at a time.
    """

    name: str = "bleu"
    label: str = "BLEU"
    higher_is_better: bool = True

    def compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricResult:
        check_samples(predictions, references)
        counts = [_count(prediction, answers) for prediction, answers in zip(predictions, references, strict=True)]
        total = counts[0]
        for sample in counts[1:]:
            total += sample
        n = len(counts)
        left_out = [_bleu(total - sample, every_order=True) for sample in counts]
        mean = math.fsum(left_out) / n
        influences = [(n - 1) * (mean - score) for score in left_out]
        return MetricResult(
            _bleu(total, every_order=True), [_bleu(sample, every_order=False) for sample in counts], influences
        )
