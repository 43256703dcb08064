"""CIDEr: TF-IDF weighted n-gram similarity of captions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainer.metrics.base import MetricResult, check_samples

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

    Args:
        keep: vectors of references stay for the next prediction, 1 KB a word; otherwise they are made anew each time.
    """

    def __init__(
        self,
        references: Sequence[Sequence[str]],
        tokenize: Callable[[str], list[str]] = str.split,
        n: int = 4,
        sigma: float = 6.0,
        keep: bool = True,
    ) -> None:
        self.n, self.sigma, self.tokenize = n, sigma, tokenize
        frequency: Counter[Ngram] = Counter()
        for captions in references:
            frequency.update({ngram for caption in captions for ngram in self._ngrams(caption)})
        self._unseen_idf = math.log(len(references))  # and of n-grams in one sample alone, which are most of them
        self._idf = {ngram: self._unseen_idf - math.log(found) for ngram, found in frequency.items() if found > 1}
        self._references = references
        self._kept: dict[int, list[_Caption]] | None = {} if keep else None

    def _ngrams(self, caption: str) -> Iterator[Ngram]:
        words = self.tokenize(caption)
        for order in range(1, self.n + 1):
            yield from zip(*(words[start:] for start in range(order)), strict=False)

    def _reference(self, sample: int) -> list[_Caption]:
        kept = self._kept.get(sample) if self._kept is not None else None
        if kept is None:
            kept = [self._vectorize(Counter(self._ngrams(caption))) for caption in self._references[sample]]
            if self._kept is not None:
                self._kept[sample] = kept
        return kept

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
        candidate = self._vectorize(Counter(self._ngrams(prediction)))
        return [
            10.0 * math.fsum(self._similarity(candidate, reference) for reference in captions) / len(captions)
            for captions in map(self._reference, samples)
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
        check_samples(predictions, references)
        corpus = CiderCorpus(references, self.tokenize, keep=False)
        return MetricResult.from_samples(
            [corpus.score(prediction, [sample])[0] for sample, prediction in enumerate(predictions)], most=10.0
        )
