"""Metrics of generated answers: exact match, accuracy at IoU 0.5, CIDEr (paper, section 4.1).

A metric compares one prediction per sample with the references of that sample and returns the value in
the units the community prints: exact match and grounding accuracy in percent (0-100), CIDEr as
pycocoevalcap's ``Cider`` returns it (mean similarity times 10, so 0-10 and usually below 2).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from trainer.errors import UserError, unknown_name

Box = tuple[float, float, float, float]

# Only plain ASCII decimals: float() alone would also take "1_0", "infinity" and digits of other scripts.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class MetricResult:
    """Value of a metric on a set of samples; ``value`` is the mean of ``per_sample``, in the same units.

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


def _check_samples(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise UserError(f"predictions and references differ in length: {len(predictions)} against {len(references)}")
    if not predictions:
        raise UserError("there are no samples to score; an evaluation set must hold at least one record")
    for index, answers in enumerate(references):
        # A bare string is a sequence of characters and would be scored letter by letter.
        if isinstance(answers, str) or not answers:
            raise UserError(f"references[{index}] must be a non-empty list of strings, got {answers!r}")


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
        _check_samples(predictions, references)
        return MetricResult.from_samples(
            [
                100.0 * (normalize_answer(prediction) in {normalize_answer(answer) for answer in answers})
                for prediction, answers in zip(predictions, references, strict=True)
            ]
        )


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
    # Absurdly large coordinates overflow to inf / inf.
    return intersection / union if math.isfinite(union) and union > 0 else 0.0


@dataclass(frozen=True)
class AccuracyIoU:
    """Percentage of predicted boxes whose IoU with a reference box is strictly above the threshold.

    A box that is missing or malformed scores 0, in the prediction and in the reference alike: a model's
    output must not stop an evaluation. Check reference boxes beforehand with `parse_box`.
    """

    threshold: float = 0.5
    name: str = "accuracy_iou"
    label: str = "IoU@0.5"
    higher_is_better: bool = True

    def compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricResult:
        _check_samples(predictions, references)
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


Ngram = tuple[str, ...]


@dataclass(frozen=True)
class _Caption:
    """TF-IDF vectors of one caption, one per n-gram order, their norms and the length in bigrams."""

    vectors: list[dict[Ngram, float]]
    norms: list[float]
    length: int


class CiderCorpus:
    """CIDEr-D against a fixed set of references, which also supplies the IDF (Vedantam et al., 2015).

    Follows pycocoevalcap's ``Cider``: the document frequency of an n-gram is the number of samples with it
    in any reference; term frequencies are clipped to the reference's; the length in the Gaussian penalty is
    the number of bigrams; orders without an n-gram count as 0, so a one-word caption reaches 10/4 at most.
    With a single sample every IDF is log 1 = 0 and the score is 0.
    """

    def __init__(
        self,
        references: Sequence[Sequence[str]],
        tokenize: Callable[[str], list[str]] = str.split,
        n: int = 4,
        sigma: float = 6.0,
    ) -> None:
        self.n, self.sigma, self.tokenize = n, sigma, tokenize
        counts = [[self._count(caption) for caption in captions] for captions in references]
        frequency: Counter[Ngram] = Counter()
        for sample in counts:
            frequency.update(set().union(*sample))
        log_samples = math.log(len(references))
        self._unseen_idf = log_samples
        self._idf = {ngram: log_samples - math.log(found) for ngram, found in frequency.items()}
        self._references = [[self._vectorize(count) for count in sample] for sample in counts]

    def _count(self, caption: str) -> Counter[Ngram]:
        words = self.tokenize(caption)
        return Counter(
            tuple(words[start : start + order])
            for order in range(1, self.n + 1)
            for start in range(len(words) - order + 1)
        )

    def _vectorize(self, counts: Mapping[Ngram, int]) -> _Caption:
        vectors: list[dict[Ngram, float]] = [{} for _ in range(self.n)]
        for ngram, count in counts.items():
            vectors[len(ngram) - 1][ngram] = count * self._idf.get(ngram, self._unseen_idf)
        norms = [math.sqrt(math.fsum(value * value for value in vector.values())) for vector in vectors]
        return _Caption(vectors, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))

    def _similarity(self, candidate: _Caption, reference: _Caption) -> float:
        """Mean over the n-gram orders of the clipped cosine, with the length penalty."""
        total = 0.0
        for order in range(self.n):
            norm = candidate.norms[order] * reference.norms[order]
            if norm == 0:
                continue
            weights = reference.vectors[order]
            total += (
                math.fsum(
                    min(value, weights[ngram]) * weights[ngram]
                    for ngram, value in candidate.vectors[order].items()
                    if ngram in weights
                )
                / norm
            )
        difference = candidate.length - reference.length
        return total / self.n * math.exp(-(difference**2) / (2 * self.sigma**2))

    def score(self, prediction: str, samples: Sequence[int]) -> list[float]:
        """CIDEr of one prediction against each of the named samples, times 10 as usual."""
        candidate = self._vectorize(self._count(prediction))
        return [
            10.0 * math.fsum(self._similarity(candidate, reference) for reference in captions) / len(captions)
            for captions in (self._references[sample] for sample in samples)
        ]


@dataclass(frozen=True)
class Cider:
    """CIDEr-D with n = 4, sigma = 6 and the IDF of the evaluated set, on pycocoevalcap's scale.

    Captions are split at white space as they are (the paper's authors do not tokenise either); give another
    ``tokenize`` for, say, PTB tokens.
    """

    tokenize: Callable[[str], list[str]] = str.split
    name: str = "cider"
    label: str = "CIDEr"
    higher_is_better: bool = True

    def compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricResult:
        _check_samples(predictions, references)
        corpus = CiderCorpus(references, self.tokenize)
        return MetricResult.from_samples(
            [corpus.score(prediction, [sample])[0] for sample, prediction in enumerate(predictions)]
        )


METRICS: dict[str, Metric] = {metric.name: metric for metric in (ExactMatch(), AccuracyIoU(), Cider())}


def get_metric(name: str) -> Metric:
    """The metric of that name; UserError with the nearest valid name for an unknown one."""
    if name in METRICS:
        return METRICS[name]
    raise unknown_name("metric", name, METRICS)
