"""Numbers, marks and verdicts on the finished page of a synthetic run, against what its tables give by hand."""

from __future__ import annotations

import json
import re

import pytest
from synthetic_run import (
    ERRORS,
    LAMBDAS,
    MAJORITY,
    SAMPLING_ERRORS,
    TASKS,
    V_FULL,
    V_MINI,
    VALUES,
    make_run,
    page,
    write,
)

from trainer.balancing.cotbal import cotbal_weights
from trainer.balancing.scores import Scores
from trainer.report import plots as report_plots
from trainer.report.tables import format_value


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "a run")


def in_bold(found):
    return re.findall(r'class="best [^"]*"><span class="value">([^<]*)<', found.html)


@pytest.mark.usefixtures("no_drawing")
class TestNumbers:
    def test_test_scores(self, run):
        found = page(run)
        assert found.tables["test-scores"][0] == [
            "Task", "majority answer", "question only", "STL", "EW", "CoTBal",
        ]  # fmt: skip
        assert found.row("test-scores", "captions")[1:] == [
            "0.500", "0.400", "0.500 ± 0.010at chance", "0.600 ± 0.020", "0.550 ± 0.030at chance",
        ]  # fmt: skip
        assert found.row("test-scores", "boxes")[1:] == [
            "10.0", "24.0", "20.0 ± 2.0", "19.0 ± 2.0", "25.0 ± 3.0",
        ]  # fmt: skip
        assert in_bold(found) == ["0.600", "50.0", "25.0"]

    def test_the_best_of_one_model_is_not_marked(self, run):
        table = json.loads((run / "results.json").read_text())
        del table["baseline"], table["methods"]["EW"]
        write(run / "results.json", table)
        assert in_bold(page(run)) == []

    def test_at_chance_is_said_in_words(self, run):
        found = page(run)
        for task in TASKS:
            cells = found.row("test-scores", task)[3:]
            for name, cell in zip(("STL", "EW", "CoTBal"), cells, strict=True):
                margin = VALUES[name][task] - MAJORITY[task]
                assert cell.endswith("at chance") == (margin <= 2 * ERRORS[name][task]), (task, name)
        assert "on 1 of 3 test scores; at chance on captions, questions." in found.words
        # Over question-only: captions 5 and questions 10 standard errors, boxes 1/3 of one.
        assert "question-only baseline by more than two standard errors on 2 of 3" in found.words
        assert "; not on boxes." in found.words

    def test_a_task_that_beats_chance_by_one_of_its_scores_is_not_at_chance_as_a_whole(self, run):
        table = json.loads((run / "results.json").read_text())
        table["tasks"]["questions"]["F1"] = "higher"
        table["methods"]["CoTBal"]["questions"]["F1"] = 90.0
        table["baselines"]["majority"]["questions"]["F1"] = 20.0
        table["standard_errors"]["CoTBal"]["questions"]["F1"] = 5.0
        write(run / "results.json", table)
        assert "on 2 of 4 test scores; at chance on captions, questions (EM)." in page(run).words

    def test_deltas_with_the_errors_of_the_test_sampling(self, run):
        found, gains = page(run), {}
        for name in ("EW", "CoTBal"):
            changes = [100 * (VALUES[name][t] - VALUES["STL"][t]) / VALUES["STL"][t] for t in TASKS]
            gains[name], delta_e = sum(changes) / 3, -sum(min(0, c) for c in changes) / 3
            errors = SAMPLING_ERRORS[name]
            per_task = [(c, errors["per_task"][t]) for c, t in zip(changes, TASKS, strict=True)]
            row = found.row("deltas", name)
            assert row[1] == f"{gains[name]:+.2f} ± {errors['delta_i']:.2f}"
            assert row[2] == f"{delta_e:.2f}"
            assert row[4:] == [f"{c:+.2f}" + (f" ± {error:.2f}" if error else "") for c, error in per_task]
            assert f"mean gain over tasks{row[1].replace(' ±', ' % ±')}" in found.words.replace("\xa0", " ")
        difference = gains["CoTBal"] - gains["EW"]
        assert found.row("deltas", "EW")[3] == f"{difference:+.2f} ± 4.75"
        assert found.row("deltas", "CoTBal")[3] == "–"

    @pytest.mark.parametrize("error", [6.0, 5.5, None])
    def test_the_verdict_on_the_difference_is_of_its_own_error(self, run, error):
        """CoTBal's Delta I of 20 % is 11.67 points above EW's."""
        table = json.loads((run / "results.json").read_text())
        table["sampling_errors"]["EW"]["behind_final"] = error
        write(run / "results.json", table)
        sentence = "the error of this difference is not known."
        if error:
            verdict = "no more" if error == 6.0 else "more"
            sentence = f"{verdict} than two standard errors of the test sampling (one is {error:.2f} points)"
        words = page(run).words
        assert f"CoTBal − EW in ΔI: +11.67 percentage points{',' if error else ';'} {sentence}" in words

    @pytest.mark.parametrize(
        ("captions", "boxes", "said"),
        [
            (0.50, 5.0, "that of CoTBal on boxes (+400 %) and that of EW on boxes (+280 %)"),
            (0.50, 16.0, "that of CoTBal on boxes (+56 %)"),  # of 10, 25 and 56.25 %
            (0.40, 16.0, None),  # of 37.5, 25 and 56.25 %: less than half of all
            (0.50, 20.0, None),
        ],
    )
    def test_a_task_that_delta_i_rests_on_is_named(self, run, captions, boxes, said):
        table = json.loads((run / "results.json").read_text())
        table["baseline"]["captions"]["CIDEr"], table["baseline"]["boxes"]["IoU@0.5"] = captions, boxes
        write(run / "results.json", table)
        words = page(run).words
        assert ("ΔI rests mostly on a single task" in words) == (said is not None)
        assert said is None or f"ΔI rests mostly on a single task, {said}: relative" in words

    def test_contributions_and_scores(self, run):
        found = page(run)
        for i in TASKS:
            expected = [(V_FULL[i][j] - V_MINI[j]) / (V_FULL[j][j] - V_MINI[j]) for j in TASKS]
            errors = [f"± 0.{TASKS.index(i) + 1}{k + 1}" if TASKS[k] != i else "" for k in range(3)]
            cells = [f"{value:.2f}{error}" for value, error in zip(expected, errors, strict=True)]
            assert found.row("contributions", i)[1:] == cells
        assert found.row("scores", "mini")[1:] == ["0.200± 1.250", "20.0± 1.2", "5.0± 1.2"]
        assert found.row("scores", "questions + mini")[1:] == ["0.300± 1.250", "40.0± 1.2", "7.5± 1.2"]
        assert found.row("scores", "boxes + mini")[1:] == ["0.200± 1.250", "30.0± 1.2", "15.0± 1.2"]

    def test_colours_of_the_heat_maps(self, run):
        """Harm is another colour than help, the largest entry has all of it; scores run from lowest to highest."""
        weights = json.loads((run / "weights.json").read_text())
        weights["contribution"] = [[1.0, 0.5, -0.25], [4.0, 1.0, 0.0], [-2.0, 0.5, 1.0]]
        write(run / "weights.json", weights)
        cells = [
            (attrs["class"], float(attrs["style"].removeprefix("--t:")))
            for tag, attrs in page(run).tags
            if tag == "td" and attrs.get("style")
        ]
        assert cells[:9] == [
            ("positive own", 0.25), ("positive", 0.125), ("negative", 0.062),
            ("positive", 1.0), ("positive own", 0.25), ("positive", 0.0),
            ("negative", 0.5), ("positive", 0.125), ("positive own", 0.25),
        ]  # fmt: skip
        assert cells[9:] == [
            ("positive", 0.0), ("positive", 0.0), ("positive", 0.091),  # of 4, 5, 7.5 and 15
            ("positive own", 1.0), ("positive", 0.25), ("positive", 0.0),
            ("positive", 0.5), ("positive own", 1.0), ("positive", 0.318),
            ("positive", 0.0), ("positive", 0.5), ("positive own", 1.0),
        ]  # fmt: skip

    def test_weights(self, run):
        found = page(run)
        names = ("λ one2all", "λ all2one", "λ C (", "λ D (", "λ CoTBal")
        for name, key in zip(names, LAMBDAS, strict=True):
            marks = [" ± 0.151", " ± 0.152", " ± 0.153"] if key == "weights" else [""] * 3
            cells = [f"{value:.3f}{mark}" for value, mark in zip(LAMBDAS[key], marks, strict=True)]
            assert found.row("lambdas", name)[1:] == cells
        assert found.row("lambdas", "difficulty")[1:] == ["0.500 ± 0.041", "0.500 ± 0.042", "0.667 ± 0.043"]
        assert "most weight to boxes (1.12 ± 0.15) and the least to captions (0.85 ± 0.15)" in found.words

    def test_weights_of_a_run_that_knows_no_errors(self, run):
        table = json.loads((run / "weights.json").read_text())
        del table["sampling_errors"]
        write(run / "weights.json", table)
        found = page(run)
        assert found.row("contributions", "captions")[1] == "1.00"
        assert found.row("lambdas", "λ CoTBal")[1:] == [f"{value:.3f}" for value in LAMBDAS["weights"]]
        assert "boxes (1.12) and the least to captions (0.85); equal weighting is 1 for every task." in found.words
        assert "resampled" not in found.words

    def test_weights_that_are_all_alike(self, run):
        table = json.loads((run / "weights.json").read_text())
        write(run / "weights.json", table | {"applied": [1.0, 1.0, 1.0]})
        assert "CoTBal gives all tasks the same weight." in page(run).words

    def test_difficulty_of_a_metric_where_lower_is_better(self, run, monkeypatch):
        """Perplexities of 5 and 1.25: what Eq. 9 gives for them is not what its axis says."""
        drawn = []
        monkeypatch.setattr(report_plots, "svg", lambda figure, label: drawn.append(figure) or "<svg></svg>")

        def difficulties():
            axes = next(figure.axes[0] for figure in drawn if "D = " in figure.axes[0].get_xlabel())
            bars = {
                text.get_text(): bar.get_width() for text, bar in zip(axes.get_yticklabels(), axes.patches, strict=True)
            }
            return bars, axes.get_xlabel()

        assert "Where lower is better" not in page(run).words
        assert difficulties()[1] == "D = 1 − V(mini) / V(own + mini)"
        drawn.clear()
        table = json.loads((run / "scores.json").read_text()) | {"higher_is_better": {"boxes": False, "captions": True}}
        table["mini"]["boxes"], table["full"]["boxes"]["boxes"] = 5.0, 1.25
        write(run / "scores.json", table)
        weights = json.loads((run / "weights.json").read_text())
        weights["difficulty"] = cotbal_weights(Scores.from_json(table), on_degenerate="clip").difficulty.tolist()
        write(run / "weights.json", weights)
        words = page(run).words
        bars, axis = difficulties()
        assert bars == pytest.approx({"captions": 0.5, "questions": 0.5, "boxes ↓": 1 - 1.25 / 5})
        assert axis == "D = 1 − V(mini) / V(own + mini); ↓: D = 1 − V(own + mini) / V(mini)"
        assert "Where lower is better (↓) Eq. 9 is taken of 1 / V, so D = 1 − V(own + mini) / V(mini)" in words

    def test_other_strategy_is_what_the_summary_names(self, run):
        table = json.loads((run / "weights.json").read_text())
        table |= {"strategy": "all2one", "applied": LAMBDAS["lambda_all2one"]}
        write(run / "weights.json", table)
        found = page(run)
        assert "CoTBal (all2one strategy) gives the most weight to questions (1.20 ± 0.15)" in found.words
        assert found.row("lambdas", "λ all2one")[1] == "0.700 ± 0.151"
        assert found.row("lambdas", "λ CoTBal")[1] == "0.850"

    def test_clipping_is_said(self, run, monkeypatch):
        drawn = []
        monkeypatch.setattr(report_plots, "svg", lambda figure, label: drawn.append(figure) or "<svg></svg>")
        table = json.loads((run / "weights.json").read_text())
        entry = {"quantity": "contribution", "tasks": ["captions", "boxes"], "original": -40.0, "value": -2.0}
        other = {"quantity": "difficulty", "tasks": ["questions"], "original": None, "value": 0.0}
        table |= {"clipped": [entry, other], "warnings": ["task 'boxes': too small"]}
        table["contribution"][0][2], table["difficulty"][1] = -2.0, 0.0
        write(run / "weights.json", table)
        found = page(run)
        assert found.row("contributions", "captions")[3] == "-2.00*± 0.13"
        assert "contribution captions → boxes: -40 became -2" in found.words
        assert found.row("lambdas", "difficulty")[1:] == ["0.500 ± 0.041", "0.000* ± 0.042", "0.667 ± 0.043"]
        bars = next(figure.axes[0] for figure in drawn if "D = " in figure.axes[0].get_xlabel())
        assert [text.get_text() for text in bars.texts] == ["0.50", "0.00*", "0.67"]
        assert "task 'boxes': too small" in found.words
        assert "what other validation samples would change. 2 of the contributions and difficulties" in found.words

    def test_stages(self, run):
        found = page(run)
        assert [row[0] for row in found.tables["stages"][1:]] == ["weights", "train-mini", "data"]
        assert found.row("stages", "data")[2:4] == ["2026-01-01 00:00", "2026-01-01 01:01"]
        assert [row[4] for row in found.tables["stages"][1:]] == ["4.2 s", "1 min 15 s", "1 h 01 min"]
        assert "Sum over stages: 1 h 02 min" in found.words
        assert "The time of a resumed stage is the sum of its attempts." in found.words

    def test_lower_is_better_and_several_metrics(self, run, monkeypatch):
        drawn = {}
        monkeypatch.setattr(report_plots, "radar", lambda tasks, ratios: drawn.update(ratios) or "<svg></svg>")
        table = json.loads((run / "results.json").read_text())
        for place, value in (
            (table["baseline"], 2.0),
            (table["methods"]["EW"], 2.5),
            (table["methods"]["CoTBal"], 1.0),
        ):
            place["boxes"]["error"] = value
        table["tasks"]["boxes"]["error"] = "lower"
        table["baselines"]["majority"]["boxes"]["error"] = 1.5
        table["baselines"]["question_only"]["boxes"]["error"] = 1.0
        for name in ERRORS:
            table["standard_errors"][name]["boxes"]["error"] = 0.1
        write(run / "results.json", table)
        found = page(run)
        (row,) = [row for row in found.tables["test-scores"] if row[0].startswith("boxes") and "error" in row[0]]
        assert row[3:] == ["2 ± 0.1at chance", "2.5 ± 0.1at chance", "1 ± 0.1"]
        assert in_bold(found) == ["0.600", "50.0", "25.0", "1"]  # of the trained models
        assert drawn["CoTBal"] == pytest.approx([1.1, 1.25, (25 / 20 + 2 / 1) / 2])
        # (25 % from IoU and 50 % from the error) / 2.
        assert found.row("deltas", "CoTBal")[-1] == "+37.50"

    def test_the_radar_says_how_a_lower_is_better_score_enters(self, run, monkeypatch):
        """A perplexity of 2 against 4 of the single-task model is drawn at 200 %, as a better score is."""
        table = json.loads((run / "results.json").read_text())
        table["tasks"]["captions"]["CIDEr"] = "lower"
        table["baseline"]["captions"]["CIDEr"] = 4.0
        for method in table["methods"].values():
            method["captions"]["CIDEr"] = 2.0
        write(run / "results.json", table)
        drawn = {}
        monkeypatch.setattr(report_plots, "radar", lambda tasks, ratios: drawn.update(ratios) or "<svg></svg>")
        words = page(run).words
        assert drawn["CoTBal"] == pytest.approx([2.0, 50 / 40, 25 / 20])
        assert "divided by it where higher is better, its inverse where lower is better" in words
        assert "more than 100 % is always better than the single-task model" in words

    def test_what_has_no_place_in_the_radar_is_named(self, run, monkeypatch):
        """Nothing can be divided by a single-task score of 0; of two scores the other one stays."""
        assert "Not shown" not in page(run).words
        drawn = []
        monkeypatch.setattr(report_plots, "grouped_bars", lambda tasks, *rest: drawn.append((tasks, *rest)) or "<svg/>")
        table = json.loads((run / "results.json").read_text())
        for place in (table["tasks"], table["baseline"], *table["methods"].values()):
            place["boxes"]["F1"] = "higher" if place is table["tasks"] else 0.0
        table["baseline"]["captions"]["CIDEr"] = 0.0
        write(run / "results.json", table)
        words = page(run).words
        assert "the single-task model scores 0 or a score is missing: captions, boxes (F1)." in words
        assert "No ΔI and ΔE. They cannot be computed: baseline['captions']['CIDEr'] is 0" in words
        ((tasks, percent),) = [(tasks, series) for tasks, series, _, reference, *_ in drawn if reference == 100]
        assert tasks == ["questions", "boxes"]
        assert percent["CoTBal"] == pytest.approx([125, 125])

    @pytest.mark.parametrize(
        ("score", "shown"), [("VQA acc.", "77.7"), ("dev F1", "77.7"), ("perplexity", "77.73"), ("CIDEr", "77.731")]
    )
    def test_digits_of_a_score(self, score, shown):
        assert format_value(77.7312, score) == shown
