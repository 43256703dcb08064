"""No-image baselines against exhaustive search and hand-made cases."""

from __future__ import annotations

import statistics
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import baselines
from trainer.baselines import ConstantAnswers, normalize_question
from trainer.metrics import BleuOfConstants, MetricResult, get_metric


def pairs(*items):
    return [(question, [answers] if isinstance(answers, str) else answers) for question, answers in items]


def majority_answer(train, evaluation, metric):
    return ConstantAnswers(train, get_metric(metric)).majority(evaluation)


def question_only(train, evaluation, metric):
    return ConstantAnswers(train, get_metric(metric)).question_only(evaluation)


COLOURS = pairs(("colour?", "Red"), ("colour?", "red."), ("colour?", "blue"), ("shape?", "box"), ("shape?", "box"))


class TestExactMatch:
    def test_majority(self):
        train = [*COLOURS, *pairs(("size?", "red"))]  # red 3 times over its spellings, box twice
        result = majority_answer(train, pairs(("?", "RED"), ("?", "box"), ("?", "red"), ("?", "x")), "exact_match")
        assert result.per_sample == [100.0, 0.0, 100.0, 0.0]
        assert result.value == 50.0

    def test_question_only(self):
        evaluation = pairs(("Colour?", "red"), ("shape?", "box"), ("shape?", "red"), ("new?", "red"))
        train = [*COLOURS, *pairs(("size?", "red"))]
        assert question_only(train, evaluation, "exact_match").per_sample == [100.0, 100.0, 0.0, 100.0]

    answers = st.sampled_from(["a", "b", "c"])
    questions = st.sampled_from(["p", "q", "r"])
    data = st.lists(st.tuples(questions, answers), min_size=1, max_size=12)

    @given(data, data)
    def test_value_is_that_of_a_most_frequent_answer(self, train, evaluation):
        counts = Counter(answer for _, answer in train)
        best = {answer for answer, count in counts.items() if count == max(counts.values())}
        possible = {100 * sum(answer == guess for _, answer in evaluation) / len(evaluation) for guess in best}
        found = majority_answer(pairs(*train), pairs(*evaluation), "exact_match").value
        assert min(abs(found - value) for value in possible) < 1e-9

    @given(data)
    def test_on_the_training_set_the_question_never_hurts(self, train):
        score = {question: max(Counter(a for q, a in train if q == question).values()) for question, _ in train}
        expected = 100 * sum(score.values()) / len(train)
        assert question_only(pairs(*train), pairs(*train), "exact_match").value == pytest.approx(expected)


@pytest.mark.parametrize("baseline", [majority_answer, question_only])
def test_annotators_of_an_evaluation_set_beside_single_answers_of_training(baseline):
    """The most frequent one, however spelt, is 2. Where two annotators say so, to the eight others two are 2/3, and to
    each of the two the other is 1/3."""
    train = pairs(("?", "Two"), ("?", "yes"), ("?", "2"), ("?", "yes"), ("?", "two."))
    evaluation = pairs(("?", ["2"] * 10), ("?", ["2", "two", *["yes"] * 8]), ("?", ["yes"] * 10))
    found = baseline(train, evaluation, "vqa_accuracy").per_sample
    assert found == pytest.approx([100, 100 * (8 * 2 / 3 + 2 * 1 / 3) / 10, 0])


class TestBoxes:
    def test_median_beats_the_most_frequent_box(self):
        train = pairs(
            *[("where?", box) for box in ("[0.0,0.0,0.1,0.1]", "[0.0,0.0,0.1,0.1]", "[0.3,0.3,0.7,0.7]")],
            *[("where?", f"[0.3,0.3,0.7,0.{last}]") for last in (68, 69, 71, 72)],
        )
        boxes = [[float(v) for v in answers[0][1:-1].split(",")] for _, answers in train]
        median = [statistics.median(side) for side in zip(*boxes, strict=True)]
        assert median == [0.3, 0.3, 0.7, 0.69]
        constant = ConstantAnswers(train, get_metric("accuracy_iou")).best(range(len(train)))
        assert constant == "[0.3,0.3,0.7,0.69]"
        assert majority_answer(train, train, "accuracy_iou").value == pytest.approx(100 * 5 / 7)

    def test_most_frequent_box_beats_the_median(self):
        # The coordinate-wise median has no box it overlaps by half; the repeated one hits twice.
        train = pairs(
            *[("?", box) for box in ("[0.0,0.0,0.1,0.1]", "[0.0,0.0,0.1,0.1]", "[0.9,0.9,1.0,1.0]")],
            *[("?", box) for box in ("[0.4,0.4,0.6,1.0]", "[0.4,0.4,1.0,0.6]")],
        )
        constant = ConstantAnswers(train, get_metric("accuracy_iou")).best(range(len(train)))
        assert constant == "[0.0,0.0,0.1,0.1]"

    def test_unreadable_boxes_do_not_crash(self):
        train = pairs(("?", "nowhere"))
        assert majority_answer(train, pairs(("?", "[0,0,1,1]")), "accuracy_iou").value == 0


class TestCaptions:
    texts = st.lists(st.sampled_from(["a", "red", "blue", "box", "car"]), min_size=1, max_size=4).map(" ".join)

    @pytest.mark.parametrize("name", ["cider", "bleu"])
    @settings(max_examples=50, deadline=None)
    @given(st.lists(texts, min_size=2, max_size=10))
    def test_best_constant_by_exhaustive_search(self, name, captions):
        train = pairs(*[("describe", caption) for caption in captions])
        metric = get_metric(name)
        references = [answers for _, answers in train]
        best = max(metric.compute([caption] * len(train), references).value for caption in captions)
        assert majority_answer(train, train, name).value == pytest.approx(best, abs=1e-9)

    words = st.lists(st.sampled_from(["a", "b", "c,", "d-1"]), max_size=9).map(" ".join)

    @settings(max_examples=50, deadline=None)
    @given(words, st.lists(st.lists(words, min_size=1, max_size=3), min_size=1, max_size=5))
    def test_bleu_of_a_constant(self, constant, references):
        expected = get_metric("bleu").compute([constant] * len(references), references).value
        assert BleuOfConstants(references).score(constant) == expected

    def test_bleu_reads_references_once_for_all_constants(self, monkeypatch):
        read = []
        monkeypatch.setattr("trainer.metrics.bleu.tokenize_13a", lambda text: read.append(text) or text.split())
        train = pairs(*[("q", f"caption {k}") for k in range(9)])
        ConstantAnswers(train, get_metric("bleu")).best(range(9))
        assert Counter(read) == {f"caption {k}": 2 for k in range(9)}  # as a reference and as a constant

    def test_bounded_work(self, monkeypatch):
        monkeypatch.setattr(baselines, "MAX_CANDIDATES", 4)
        monkeypatch.setattr(baselines, "MAX_SCORED", 5)
        calls = []

        def score(self, prediction, samples):
            calls.append((prediction, list(samples)))
            return [0.0] * len(samples)

        monkeypatch.setattr(baselines.CiderCorpus, "score", score)
        train = pairs(*[("q", f"caption {k}") for k in range(50)], ("q", "caption 7"))
        ConstantAnswers(train, get_metric("cider")).best(range(len(train)))
        assert len(calls) == 4
        assert calls[0][0] == "caption 7"  # the most frequent one is always among the candidates
        assert {len(samples) for _, samples in calls} == {5}
        monkeypatch.setattr(baselines, "MAX_CAPTIONS", 17)
        few = ConstantAnswers(train, get_metric("cider"))
        assert few.answers == [[f"caption {3 * k}"] for k in range(17)], "evenly spaced"
        few.question_only(pairs(("q", "caption 1"), ("new", "caption 2")))
        assert len(ConstantAnswers(train, get_metric("exact_match")).answers) == 51


def test_the_best_constant_where_lower_is_better():
    """The distance to the answers: 3 is nearest, although 9 is the most frequent."""

    class Distance:
        name, label, higher_is_better = "distance", "distance", False

        def compute(self, predictions, references):
            return MetricResult.from_samples(
                [abs(int(text) - int(answers[0])) for text, answers in zip(predictions, references, strict=True)]
            )

    train = pairs(*[("?", answer) for answer in ("9", "9", "3", "2", "1")])
    assert ConstantAnswers(train, Distance()).best(range(len(train))) == "3"


@pytest.mark.parametrize("baseline", [majority_answer, question_only])
def test_blanks_at_the_ends_of_answers_do_not_count(baseline):
    """As in a model's predictions; the metric compares strings."""
    train = pairs(("?", " red"), ("?", "red\n"), ("?", "box"), ("?", "box"), ("?", "red"))
    assert baseline(train, pairs(("?", "red "), ("?", "red"), ("?", "box")), "gqa_accuracy").per_sample == [100, 100, 0]


class TestQuestions:
    @pytest.mark.parametrize(
        ("question", "expected"),
        [
            ("<image>\nWhat  is it?\nAnswer the question using a single word or phrase.", "what is it?"),
            ("[0.1,0.2,0.3,0.4] Provide a short description for this region.", ""),
            ("A dog\nProvide the bounding box coordinate of the region this sentence describes.", "a dog"),
            ("Region [0.1, 0.2, 0.3, 0.4]: what?", "region : what?"),
        ],
    )
    def test_normalize(self, question, expected):
        assert normalize_question(question) == expected


@pytest.mark.parametrize("baseline", [majority_answer, question_only])
def test_bad_input(baseline):
    with pytest.raises(ValueError, match="at least one training record"):
        baseline([], pairs(("q", "a")), "exact_match")
    with pytest.raises(ValueError, match="no samples"):
        baseline(pairs(("q", "a")), [], "exact_match")
