"""The report of runs that are not finished, damaged or unusual: what is missing is said, nothing crashes."""

from __future__ import annotations

import json
import math
import re

import pytest
from synthetic_run import PIECES, make_run, page, write

from trainer.pipeline.places import last_step
from trainer.report import build_report
from trainer.report import plots as report_plots
from trainer.report.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "a run")


@pytest.mark.usefixtures("no_drawing")
class TestPartialRuns:
    @pytest.mark.parametrize("piece", PIECES)
    def test_without_one_file(self, run, piece):
        (run / piece).unlink()
        found = page(run)
        assert "This run is not complete" in found.words
        assert f"{piece}:" in found.words

    @pytest.mark.parametrize("piece", PIECES)
    def test_with_only_one_file(self, run, tmp_path, piece):
        alone = tmp_path / "alone"
        write(alone / piece, (run / piece).read_text())
        found = page(alone)
        assert found.words.count("Not there yet") >= 4
        assert all(f"{name}:" in found.words for name in PIECES if name != piece)

    @pytest.mark.parametrize("piece", PIECES[1:])
    @pytest.mark.parametrize("text", ["", "{", "[]", '{"tasks": ["captions"]}', "null", '{"tasks": {"a": 3}}'])
    def test_damaged_file(self, run, piece, text):
        write(run / piece, text)
        page(run)

    def test_damaged_file_is_named(self, run):
        write(run / "weights.json", '{"tasks": ["captions"]')
        found = page(run)
        assert "Could not be read" in found.words
        assert "weights.json: Expecting" in found.words
        assert "contributions" not in found.tables

    def test_an_infinite_perplexity_of_a_seed_is_no_damage(self, run):
        """Null in the table: the mean is not known, nor how far seeds are apart; other methods have their Delta I."""
        others = page(run).tables["deltas"]
        table = json.loads((run / "results.json").read_text())
        ew = table["methods"]["EW"]
        table["seeds"] = {"EW": [json.loads(json.dumps(ew)) for _ in range(3)]}
        table["seeds"]["EW"][1]["captions"]["CIDEr"] = ew["captions"]["CIDEr"] = None
        table["standard_errors"]["EW"]["captions"]["CIDEr"] = None
        write(run / "results.json", table)
        found = page(run)
        assert found.row("test-scores", "captions")[4] == "–"
        assert found.row("test-scores", "questions")[4] == "44.0 ± 1.5seeds ± 0.0at chance"
        assert found.tables["deltas"] == [row for row in others if row[0] != "EW"] != others
        assert "Left out, since a test score is infinite: EW." in found.words
        assert "Could not be read" not in found.words

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"tasks": 3}'])
    def test_damaged_weights_of_a_variant(self, run, text):
        write(run / "weights/hot.json", text)
        found = page(run)
        assert "weights/hot.json: " in found.words
        assert "variants" not in found.tables

    def test_half_written_log_and_predictions(self, run):
        log = run / "trainings/cotbal/log.jsonl"
        log.write_text(log.read_text() + '{"step": 11, "ste')
        assert "trainings/cotbal/log.jsonl: 1 unreadable line left out" in page(run).words

    def test_resumed_log_keeps_the_later_line(self, run):
        log = run / "trainings/cotbal/log.jsonl"
        log.write_text(log.read_text() + json.dumps({"step": 4, "steps": 10, "loss": 123.0}) + "\n")
        steps = RunDirectory(run).log("cotbal")
        assert [step["step"] for step in steps] == list(range(1, 11))
        assert steps[3]["loss"] == 123.0

    def test_a_loss_that_is_null_leaves_a_gap(self, run, monkeypatch):
        """As log.jsonl has it where a loss is not a number."""
        log = run / "trainings/cotbal/log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        lines[3] |= {"loss": None, "grad_norm": None}
        lines[3]["tasks"]["boxes"]["loss"] = None
        lines[5]["tasks"]["captions"] = {"loss": 0.0, "tokens": 0, "weight": 1.0}  # none in the step
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        drawn = {}
        monkeypatch.setattr(report_plots, "loss_curves", lambda panels: drawn.update(panels) or "<svg></svg>")
        assert "Could not be read" not in page(run).words
        assert drawn["boxes"]["CoTBal"][0] == (10, 20, 30, 50, 60, 70, 80, 90, 100)
        assert drawn["captions"]["CoTBal"][0] == (10, 20, 30, 40, 50, 70, 80, 90, 100)
        assert drawn["captions"]["CoTBal"][1][0] == 3.0
        assert last_step(log) == (10, 10)

    def test_test_scores_before_the_results(self, run):
        (run / "results.json").unlink()
        entry = {"metric": "EM", "value": 61.5, "standard_error": 1.5, "samples": 8}
        write(run / "evaluations/stl-questions/test/metrics.json", {"questions": entry})
        found = page(run)
        assert found.tables["test-scores"][0] == ["Task", "STL"]
        assert found.row("test-scores", "questions")[1] == "61.5 ± 1.5"
        assert "these are the test evaluations so far" in found.words

    def test_the_best_so_far_is_the_lowest_perplexity(self, run):
        """STL comes first and CoTBal last, as in the whole table; other seeds have no column."""
        (run / "results.json").unlink()
        for name, value in (("cotbal", 7.5), ("ew", 8.5), ("stl-questions", 9.5), ("ew@1", 5.5)):
            entry = {"metric": "perplexity", "value": value, "standard_error": 1.5, "samples": 8}
            write(run / f"evaluations/{name}/test/metrics.json", {"questions": entry})
        found = page(run)
        assert found.tables["test-scores"][0] == ["Task", "STL", "EW", "CoTBal"]
        assert found.row("test-scores", "questions")[1:] == ["9.5 ± 1.5", "8.5 ± 1.5", "7.5 ± 1.5"]
        assert re.findall(r'class="best [^"]*"><span class="value">([^<]*)<', found.html) == ["7.5"]

    def test_missing_and_corrupt_images(self, run):
        (run / "images/0.png").unlink()
        (run / "images/1.png").write_bytes(b"not an image")
        found = page(run)
        assert "image 0.png not found" in found.words
        assert "image 1.png cannot be read" in found.words

    def test_run_without_single_task_models(self, run):
        table = json.loads((run / "results.json").read_text())
        del table["baseline"]
        write(run / "results.json", table)
        found = page(run)
        assert "which this run does not train" in found.words
        assert found.row("test-scores", "boxes")[-1] == "25.0 ± 3.0"

    def test_zero_baseline_says_why_there_is_no_delta(self, run):
        table = json.loads((run / "results.json").read_text())
        table["baseline"]["boxes"]["IoU@0.5"] = 0.0
        write(run / "results.json", table)
        found = page(run)
        assert "baseline['boxes']['IoU@0.5'] is 0" in found.words
        assert "deltas" not in found.tables

    def test_nan_standard_error_is_left_out(self, run):
        table = json.loads((run / "results.json").read_text())
        table["standard_errors"]["CoTBal"]["questions"]["EM"] = math.nan
        write(run / "results.json", table)
        assert page(run).row("test-scores", "questions")[-1] == "50.0"

    def test_not_a_run(self, tmp_path):
        with pytest.raises(ValueError, match="no run directory"):
            build_report(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="holds nothing of a run"):
            build_report(tmp_path)
