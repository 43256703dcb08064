"""Metrics against the scorers their communities use.

``official_metric_values.json`` holds what those programs printed for strings made by us; its ``sources`` names each
program and revision. No line of them is here.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.metrics import get_metric, perplexity, process_vqa_answer
from trainer.metrics.bleu import tokenize_13a
from trainer.metrics.vqa import vqa_score

OFFICIAL = json.loads((Path(__file__).parent / "official_metric_values.json").read_text())


class TestVqa:
    def test_there_are_enough_tricky_answers(self):
        assert len(OFFICIAL["vqa_processing"]) >= 200
        changed = sum(text.lower() != processed for text, processed in OFFICIAL["vqa_processing"])
        assert changed >= 200

    @pytest.mark.parametrize("part", range(6))
    def test_processing(self, part):
        for text, processed in OFFICIAL["vqa_processing"][part::6]:
            assert process_vqa_answer(text) == processed, text

    def test_accuracy(self):
        rows = OFFICIAL["vqa_accuracy"]
        result = get_metric("vqa_accuracy").compute(
            [row["prediction"] for row in rows], [row["answers"] for row in rows]
        )
        assert result.per_sample == pytest.approx([row["score"] for row in rows], abs=1e-9)
        assert result.value == pytest.approx(OFFICIAL["vqa_overall"], abs=1e-9)

    @given(st.integers(0, 10))
    def test_score_is_the_mean_over_nine_of_ten_annotators(self, matching):
        answers = ["yes"] * matching + ["no", "maybe"] * 5
        answers = answers[:10]
        expected = sum(min(1, answers[:i].count("yes") / 3 + answers[i + 1 :].count("yes") / 3) for i in range(10)) / 10
        assert vqa_score("yes", answers) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize(
        ("prediction", "answer"), [("Yes", "yes"), ("yes.", "yes"), ("Two", "2"), ("2", "two"), ("A dog", "dog")]
    )
    def test_unanimous_questions_are_processed_too(self, prediction, answer):
        """As in the usual pipeline, worked out by hand: what is handed in is processed, whatever annotators said."""
        assert vqa_score(prediction, [answer] * 10) == 1
        assert vqa_score(prediction, [answer] * 9 + ["other"]) == 1
        assert vqa_score(prediction, ["other"] * 10) == 0

    @pytest.mark.parametrize(
        ("text", "answer"), [("red\nblue", "red blue"), ("red\tblue", "red blue"), ("red/blue/ ", "red blue")]
    )
    def test_an_answer_is_one_line_without_blanks_around_it(self, text, answer):
        """As the script begins, worked out by hand: "/ " would have every "/" deleted, where one makes a blank."""
        assert vqa_score(text, [answer] * 10) == 1

    def test_one_reference_is_refused(self):
        with pytest.raises(ValueError, match=r"references\[1\] has one answer.*exact_match"):
            get_metric("vqa_accuracy").compute(["a", "b"], [["a", "b"], ["b"]])


class TestOthers:
    def test_span_f1(self):
        rows = OFFICIAL["span_f1"]
        result = get_metric("span_f1").compute([row[0] for row in rows], [[row[1]] for row in rows])
        assert result.per_sample == pytest.approx([row[2] for row in rows], abs=1e-9)
        assert result.value == pytest.approx(OFFICIAL["span_f1_overall"], abs=1e-9)

    def test_span_f1_takes_the_best_reference(self):
        assert get_metric("span_f1").compute(["the red cat"], [["dog", "red dog", "red cats"]]).value == 50.0

    @pytest.mark.parametrize(("metric", "column"), [("chartqa_relaxed", 2), ("chartqa_strict", 3)])
    def test_chartqa(self, metric, column):
        for row in OFFICIAL["chartqa"]:
            scored = get_metric(metric).compute([row[0]], [[row[1]]]).value
            assert scored == 100.0 * row[column], row

    def test_chartqa_takes_percents_for_hundredths(self):
        """0.0952 is within 5 % of 0.1, 0.0949 is not."""
        found = get_metric("chartqa_relaxed").compute(["9.52%", "9.49%"], [["0.1"], ["0.1"]])
        assert found.per_sample == [100.0, 0.0]

    def test_chartqa_any_reference_counts(self):
        assert get_metric("chartqa_relaxed").compute(["104"], [["1", "100"]]).value == 100.0

    @pytest.mark.parametrize("metric", ["accuracy_iou", "exact_match"])
    def test_the_authors_scorers(self, metric):
        for prediction, answer, correct in OFFICIAL[metric]:
            assert get_metric(metric).compute([prediction], [[answer]]).value == 100.0 * correct, (prediction, answer)

    @pytest.mark.parametrize(
        ("prediction", "answers", "score"),
        [("Left..", ["left"], 100), ("left ", ["left"], 0), ("left", ["Left"], 0), ("no", ["yes", "no"], 100)],
    )
    def test_gqa_is_string_equality_after_the_usual_preparation(self, prediction, answers, score):
        """Worked out by hand: GQA's script compares with ==; LLaVA's converter drops final points and lower-cases."""
        assert get_metric("gqa_accuracy").compute([prediction], [answers]).value == score


class TestBleu:
    @pytest.mark.parametrize("case", range(len(OFFICIAL["bleu"])))
    def test_scores(self, case):
        row = OFFICIAL["bleu"][case]
        result = get_metric("bleu").compute(row["predictions"], row["references"])
        assert result.value == pytest.approx(row["value"], abs=1e-9)
        assert result.per_sample == pytest.approx(row["per_sample"], abs=1e-9)

    def test_tokens(self):
        for text, tokens in OFFICIAL["bleu_tokens"]:
            assert tokenize_13a(text) == tokens, text

    def test_standard_error_leaves_out_one_sample_at_a_time(self):
        row = max(OFFICIAL["bleu"], key=lambda row: len(row["predictions"]))
        metric, n = get_metric("bleu"), len(row["predictions"])
        without = [
            metric.compute(
                row["predictions"][:i] + row["predictions"][i + 1 :], row["references"][:i] + row["references"][i + 1 :]
            ).value
            for i in range(n)
        ]
        mean = sum(without) / n
        expected = math.sqrt((n - 1) / n * sum((score - mean) ** 2 for score in without))
        assert metric.compute(row["predictions"], row["references"]).standard_error == pytest.approx(expected, rel=1e-9)
        assert expected > 0


class TestPerplexity:
    def test_equals_exp_of_torchs_mean_cross_entropy(self):
        generator = torch.Generator().manual_seed(0)
        counts = [1, 7, 40, 3]
        logits = torch.randn(sum(counts), 11, generator=generator, dtype=torch.float64)
        labels = torch.randint(11, (sum(counts),), generator=generator)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").split(counts)
        result = perplexity([float(loss.sum()) for loss in losses], counts)
        expected = torch.nn.functional.cross_entropy(logits, labels).exp().item()
        assert result.value == pytest.approx(expected, rel=1e-12)
        assert result.per_sample == pytest.approx([loss.mean().exp().item() for loss in losses], rel=1e-12)

    def test_standard_error_against_resampling(self):
        """Delta method against 4,000 bootstrap resamples of 400 samples: they agree to a few percent."""
        generator = torch.Generator().manual_seed(1)
        counts = torch.randint(5, 15, (400,), generator=generator)
        losses = counts * (1.0 + 0.3 * torch.rand(400, generator=generator))
        chosen = torch.randint(400, (4000, 400), generator=generator)
        resampled = (losses[chosen].sum(1) / counts[chosen].sum(1)).exp()
        result = perplexity(losses.tolist(), counts.tolist())
        assert result.standard_error == pytest.approx(resampled.std().item(), rel=0.06)  # 4000 draws: 1.1 % each

    def test_standard_error_of_samples_of_one_length(self):
        """Then the mean loss is a mean over samples: its error is s / sqrt(n), and exp multiplies it by the value."""
        result = perplexity([2.0, 6.0, 7.0], [4, 4, 4])
        assert result.standard_error == pytest.approx(
            math.exp(1.25) * statistics.stdev([0.5, 1.5, 1.75]) / math.sqrt(3), rel=1e-12
        )

    def test_a_certain_model_has_perplexity_one(self):
        assert perplexity([0.0, 0.0], [1, 2]).value == 1.0

    def test_overflow_and_one_sample(self):
        assert perplexity([1e6], [1]).value == math.inf
        assert math.isnan(perplexity([1e6, 2e6], [1, 1]).standard_error)
        assert math.isnan(perplexity([1.0], [1]).standard_error)

    @pytest.mark.parametrize(
        ("losses", "counts", "message"),
        [
            ([], [], "no samples"),
            ([1.0], [1, 2], "1 against 2"),
            ([1.0], [0], r"tokens\[0\] is 0"),
            ([-1.0], [1], r"loss_sums\[0\] is -1"),
            ([math.nan], [1], r"loss_sums\[0\] is nan"),
        ],
    )
    def test_bad_input(self, losses, counts, message):
        with pytest.raises(ValueError, match=message):
            perplexity(losses, counts)
