"""Metrics against independent references: official CIDEr values, a brute-force CIDEr, worked-out numbers."""

from __future__ import annotations

import math
import statistics
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.metrics import (
    METRICS,
    Cider,
    MetricResult,
    get_metric,
    intersection_over_union,
    normalize_answer,
    parse_box,
    takes_losses,
)

# Values printed by pycocoevalcap 1.2 from the package index (cider/cider.py, Cider().compute_score) on
# exactly these strings, without its PTB tokeniser.
OFFICIAL_REFERENCES = [
    ["a red apple on the left and a blue car", "an apple next to a car"],
    ["two dogs and a cat", "a cat and two dogs in a row", "dogs"],
    ["a red apple"],
    ["The sun above the sea .", "a sun over the sea"],
    ["a blue car in front of a big red house with a tree"],
]
OFFICIAL_PREDICTIONS = [
    "a red apple and a blue car",
    "a cat and a cat and a cat and two dogs",
    "a red apple",
    "moon",
    "a blue car in front of a big red house",
]
OFFICIAL_VALUE = 3.690470337512855
OFFICIAL_PER_SAMPLE = [2.0733715199930427, 1.4365873261889874, 7.5, 0.0, 7.442392841382242]


def brute_force_cider(predictions, references):
    """CIDEr-D over dense vectors of every n-gram of the set, sharing no code with the package."""
    value = np.zeros(len(predictions))
    for n in (1, 2, 3, 4):

        def grams(text, n=n):
            words = text.split()
            return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]

        texts = [t for refs in references for t in refs] + list(predictions)
        vocabulary = sorted({g for t in texts for g in grams(t)})
        df = np.array([sum(any(g in grams(r) for r in refs) for refs in references) for g in vocabulary], dtype=float)
        idf = math.log(len(references)) - np.log(np.maximum(df, 1))

        def dense(text, vocabulary=vocabulary, idf=idf, grams=grams):
            found = grams(text)
            return np.array([found.count(g) for g in vocabulary]) * idf

        for s, (prediction, refs) in enumerate(zip(predictions, references, strict=True)):
            for reference in refs:
                h, r = dense(prediction), dense(reference)
                product = np.linalg.norm(h) * np.linalg.norm(r)
                if product == 0:
                    continue
                # The official code measures length in bigrams: words - 1, and 0 for an empty text.
                length = [max(len(t.split()) - 1, 0) for t in (prediction, reference)]
                penalty = math.exp(-((length[0] - length[1]) ** 2) / (2 * 6.0**2))
                value[s] += 10 * (np.minimum(h, r) @ r) / product * penalty / 4 / len(refs)
    return value


class TestCider:
    def test_official_values(self):
        result = get_metric("cider").compute(OFFICIAL_PREDICTIONS, OFFICIAL_REFERENCES)
        assert result.value == pytest.approx(OFFICIAL_VALUE, abs=1e-12)
        assert result.per_sample == pytest.approx(OFFICIAL_PER_SAMPLE, abs=1e-12)

    def test_worked_out(self):
        # Two samples, no shared word: every idf is log 2, so the cosine of equal captions is 1 in the orders
        # they reach: 10 * 2/4 for two words. "red apple" against "red car": unigram cosine 1/2, bigram 0.
        result = Cider().compute(["red apple", "blue sky"], [["red apple"], ["blue sea"]])
        assert result.per_sample == pytest.approx([5.0, 10 * 0.5 / 4], abs=1e-12)

    def test_length_penalty_worked_out(self):
        # 4 words against 1: no bigram in the reference, unigram cosine 1/2, lengths 3 and 0 bigrams.
        result = Cider().compute(["a b c d", "z"], [["a"], ["y"]])
        assert result.per_sample == pytest.approx([10 / 4 * 0.5 * math.exp(-9 / 72), 0.0], abs=1e-12)

    words = st.lists(st.sampled_from(["red", "blue", "apple", "car", "the", "on", "left"]), max_size=7).map(" ".join)

    @given(st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=6))
    def test_brute_force(self, samples):
        predictions, references = [p for p, _ in samples], [r for _, r in samples]
        result = Cider().compute(predictions, references)
        assert result.per_sample == pytest.approx(brute_force_cider(predictions, references).tolist(), abs=1e-10)

    def test_case_and_tokens_are_left_alone_unless_asked(self):
        references = [["The sun."], ["moon"]]
        assert Cider().compute(["the sun", "moon"], references).per_sample[0] == 0
        tokenize = Cider(tokenize=lambda text: text.lower().rstrip(".").split())
        assert tokenize.compute(["the sun", "moon"], references).per_sample[0] == pytest.approx(5.0)

    def test_memory_does_not_grow_with_captions_of_known_ngrams(self):
        """One of 20 words takes 15 KB as vectors: 200 thousand with five references each would not fit into 16 GB."""
        words = " ".join(map(str, range(20)))
        tracemalloc.start()
        Cider().compute([words] * 500, [[words]] * 500)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 500 * 1000


class TestExactMatch:
    @pytest.mark.parametrize(
        ("prediction", "answers", "score"),
        [
            (" Yes. ", ["yes"], 100.0),
            ("yes..", ["yes"], 0.0),
            ("yes", ["no", "YES."], 100.0),
            ("", ["."], 100.0),
            ("U.S.", ["u.s"], 100.0),
            ("two dogs", ["two  dogs"], 0.0),
        ],
    )
    def test_cases(self, prediction, answers, score):
        assert get_metric("exact_match").compute([prediction], [answers]).per_sample == [score]

    def test_normalize(self):
        assert normalize_answer("\tA.B.\n") == "a.b"

    def test_percent_and_standard_error(self):
        result = get_metric("exact_match").compute(["a", "b", "c", "d"], [["a"], ["b"], ["c"], ["x"]])
        assert result.value == 75.0
        # Unbiased variance of a Bernoulli sample: p (1 - p) n / (n - 1), then over n.
        assert result.standard_error == pytest.approx(100 * math.sqrt(0.75 * 0.25 / 3), rel=1e-12)


class TestAccuracyIoU:
    @pytest.mark.parametrize(
        ("prediction", "score"),
        [
            ("[0.00,0.00,0.50,1.00]", 0.0),  # exactly half of the unit box: strictly above is asked
            ("[0,0,0.51,1]", 100.0),
            ("It is at [ 0, 0 ,1, 1 ] or [5,5,6,6]", 100.0),
            ("[5,5,6,6] or [0,0,1,1]", 0.0),  # only the first counts
            ("[0,0,1]", 0.0),
            ("[0,0,1,1,1]", 0.0),
            ("[0,0,1,nan]", 0.0),
            ("[0,0,1,inf]", 0.0),
            ("[0,0,1,1e999]", 0.0),
            ("[-1e308,-1e308,1e308,1e308]", 0.0),
            ("[1,1,0,0]", 0.0),
            ("[0,0,1_0,1]", 0.0),
            ("[0,0,1,1", 0.0),
            ("", 0.0),
            ("[]", 0.0),
            ("[[0,0,1,1]]", 100.0),
            ("[a,b,c,d]", 0.0),
            ("[0,0,1,b]", 0.0),
        ],
    )
    def test_cases(self, prediction, score):
        assert get_metric("accuracy_iou").compute([prediction], [["[0,0,1,1]"]]).per_sample == [score]

    def test_one_coordinate_beyond_the_largest_float_is_no_box(self):
        assert parse_box("[0,0,1e999,1]") is None

    def test_any_reference_counts(self):
        assert get_metric("accuracy_iou").compute(["[0,0,1,1]"], [["[5,5,6,6]", "[0,0,1,1]"]]).value == 100.0

    def test_unreadable_reference_scores_zero(self):
        assert get_metric("accuracy_iou").compute(["[0,0,1,1]"], [["none"]]).value == 0

    @given(st.text(alphabet="[]0123456789.,- enai", max_size=30))
    def test_never_crashes(self, text):
        assert get_metric("accuracy_iou").compute([text], [[text]]).value in (0.0, 100.0)

    sides = st.lists(st.integers(0, 12), min_size=2, max_size=2, unique=True).map(sorted)
    boxes = st.tuples(sides, sides).map(lambda found: (found[0][0], found[1][0], found[0][1], found[1][1]))

    @given(boxes, boxes)
    def test_iou_counts_grid_cells(self, a, b):
        def cells(box):
            return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

        assert intersection_over_union(parse_box(str(list(a))), parse_box(str(list(b)))) == pytest.approx(
            len(cells(a) & cells(b)) / len(cells(a) | cells(b)), abs=1e-12
        )

    @given(boxes)
    def test_a_box_without_an_area_is_none(self, box):
        x1, y1, x2, y2 = box
        assert parse_box(f"[{x1},{y1},{x2},{y2}]") == box
        for wrong in ((x2, y1, x1, y2), (x1, y2, x2, y1), (x1, y1, x1, y2), (x1, y1, x2, y1)):
            assert parse_box(str(list(wrong))) is None

    @pytest.mark.parametrize("size", [1e-200, 1e200])
    def test_an_area_that_no_float_has_is_no_hit(self, size):
        assert intersection_over_union((0, 0, size, size), (0, 0, size, size)) == 0


class TestRegistry:
    def test_contents(self):
        assert {n: (m.name, m.label, m.higher_is_better) for n, m in METRICS.items()} == {
            "exact_match": ("exact_match", "EM", True),
            "accuracy_iou": ("accuracy_iou", "IoU@0.5", True),
            "cider": ("cider", "CIDEr", True),
            "vqa_accuracy": ("vqa_accuracy", "VQA acc.", True),
            "gqa_accuracy": ("gqa_accuracy", "GQA acc.", True),
            "chartqa_strict": ("chartqa_strict", "ChartQA strict", True),
            "chartqa_relaxed": ("chartqa_relaxed", "ChartQA relaxed", True),
            "span_f1": ("span_f1", "F1", True),
            "bleu": ("bleu", "BLEU", True),
            "perplexity": ("perplexity", "perplexity", False),
        }

    @pytest.mark.parametrize(("given_name", "nearest"), [("exactmatch", "exact_match"), ("CIDER", "cider")])
    def test_unknown_name_suggests(self, given_name, nearest):
        with pytest.raises(ValueError, match=f"unknown metric '{given_name}'.*{nearest}"):
            get_metric(given_name)

    def test_perplexity_takes_no_answers(self):
        assert [name for name in METRICS if takes_losses(name)] == ["perplexity"]
        with pytest.raises(ValueError, match="takes losses, not answers"):
            get_metric("perplexity").compute(["a"], [["a"]])

    @pytest.mark.parametrize("name", [name for name in METRICS if not takes_losses(name)])
    @pytest.mark.parametrize(
        ("predictions", "references", "message"),
        [
            ([], [], "no samples"),
            (["a"], [], "1 against 0"),
            (["a"], [[]], r"references\[0\]"),
            (["a"], ["abc"], r"references\[0\]"),
        ],
    )
    def test_bad_input(self, name, predictions, references, message):
        with pytest.raises(ValueError, match=message):
            get_metric(name).compute(predictions, references)


@given(st.lists(st.floats(1, 99), min_size=2, max_size=20))
def test_standard_error_is_of_the_mean(samples):
    result = MetricResult.from_samples(samples)
    assert result.value == pytest.approx(statistics.fmean(samples), abs=1e-9)
    assert result.standard_error == pytest.approx(statistics.stdev(samples) / math.sqrt(len(samples)), abs=1e-9)


def test_one_sample_has_no_standard_error():
    assert math.isnan(MetricResult.from_samples([3.0]).standard_error)
