"""The finished page of a synthetic run: that it loads and runs nothing, hostile text, samples and sources."""

from __future__ import annotations

import base64
import io
import json
import math
import re

import pytest
from PIL import Image
from synthetic_run import HOSTILE, LAMBDAS, TASKS, V_FULL, V_MINI, make_run, page, prediction, write

from trainer.metrics import METRICS
from trainer.report import build_report
from trainer.report.plots import smooth
from trainer.report.samples import choose
from trainer.report.tables import ScoreTable


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "a run")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The page of the unchanged run with its figures, drawn once."""
    return page(make_run(tmp_path_factory.mktemp("report") / "a run"))


class TestPage:
    def test_nothing_is_loaded_and_nothing_runs(self, full):
        policy = next(attrs["content"] for tag, attrs in full.tags if attrs.get("http-equiv"))
        assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in full.tags}
        for _, attrs in full.tags:
            for name in ("src", "href", "xlink:href", "srcset", "data"):
                assert attrs.get(name, "#").startswith(("#", "data:image/"))
            assert not any(name.startswith("on") for name in attrs)
            assert "url(" not in (attrs.get("style") or "").replace("url(#", "")
        assert "@import" not in full.html
        assert not re.search(r"url\((?!#)", full.html)

    def test_ids_are_unique_and_links_lead_somewhere(self, full):
        ids = [attrs["id"] for _, attrs in full.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert {a["href"][1:] for tag, a in full.tags if tag == "a"} <= set(ids)

    def test_figures_follow_the_theme(self, full):
        labels = [attrs["aria-label"] for tag, attrs in full.tags if tag == "svg" and "aria-label" in attrs]
        assert len(labels) == 4  # radar, difficulty, weights, losses
        colors = set(
            re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{6})", re.sub(r"<style>.*?</style>", "", full.html, flags=re.S))
        )
        assert colors == set()
        assert set(re.findall(r"var\(--([a-z]+)\)", full.html)) <= set(re.findall(r"--([a-z-]+):", full.html)) | {"t"}

    def test_hostile_text_is_text(self, full):
        assert HOSTILE in full.words
        assert not any("example.org" in (value or "") for _, attrs in full.tags for value in attrs.values())
        assert "a < b" in full.words

    def test_hostile_task_name(self, run):
        for file in run.rglob("*.json"):
            file.write_text(file.read_text().replace('"captions"', json.dumps("<b>$x$ & y</b>")))
        found = page(run)
        assert found.row("contributions", "<b>$x$")[1] == "1.00"
        assert "b" not in {tag for tag, _ in found.tags}

    def test_images_are_inside_and_answers_are_marked(self, full):
        images = [attrs["src"] for tag, attrs in full.tags if tag == "img"]
        assert len(images) == 12
        colors = set()
        for source in images:
            with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as picture:
                assert picture.size == (8, 8)
                colors.add(picture.convert("RGB").getpixel((4, 4)))
        assert len(colors) > 1
        # Two tasks are right or wrong; captions carry their score and say when they match exactly.
        assert full.words.count("✓ right") == full.words.count("✗ wrong") == 4
        scores = [float(s) for s in re.findall(r"CIDEr (\d\.\d{3}) Question", full.words)]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 4
        boxes = [attrs for tag, attrs in full.tags if tag == "rect" and attrs.get("class") == "predicted"]
        drawn = {tuple(float(box[k]) for k in ("x", "y", "width", "height")) for box in boxes}
        assert drawn == {(10, 10, 50, 50), (70, 70, 20, 20)}

    @pytest.mark.usefixtures("no_drawing")
    def test_long_texts_are_cut_and_images_that_are_not_square_have_no_boxes(self, run):
        """Boxes may be relative to the image or to the padded square: the page cannot know."""
        Image.new("RGB", (8, 16), "red").save(run / "images" / "1.png")
        rows = [prediction(k, "boxes") | {"image": "1.png"} for k in range(8)]
        write(run / "evaluations/cotbal/test/boxes.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        rows = [prediction(k, "questions") | {"references": ["x" * 401, "y", "z", "u", "v"]} for k in range(8)]
        write(run / "evaluations/cotbal/test/questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        found = page(run)
        assert not any(tag == "rect" for tag, _ in found.tags)
        assert found.words.count("Reference" + "x" * 400 + " … y z (+ 2 more)") == 4

    @pytest.mark.usefixtures("no_drawing")
    def test_losses_have_a_score_and_no_prediction(self, run):
        """Perplexities of 1.25, 1.5, ..., 3: no answer is right or wrong, none is "empty"."""
        rows = [prediction(k, "questions") | {"loss_sum": 1.0, "tokens": 2, "score": 1.25 + k / 4} for k in range(8)]
        for row in rows:
            del row["prediction"]
        write(run / "evaluations/cotbal/test/questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        table = json.loads((run / "tasks.json").read_text())
        table["tasks"][1]["metric"] = "perplexity"
        write(run / "tasks.json", table)
        found = page(run)
        assert re.findall(r"perplexity (\d\.?\d*) Question", found.words) == ["2.75", "2.25", "1.75", "1.25"]
        assert found.words.count("✓ right") == found.words.count("✗ wrong") == 2  # the boxes' alone
        cards = (
            found.words.split("Predictions on test data")[1]
            .partition("questions perplexity –, 4 of 8 answers")[2]
            .partition("boxes IoU")[0]
        )
        assert cards.count("Referenceanswer") == 4
        assert "Prediction" not in cards

    @pytest.mark.usefixtures("no_drawing")
    @pytest.mark.parametrize("metric", ["vqa_accuracy", "span_f1", "bleu"])
    def test_an_answer_that_a_metric_grades_is_not_right_for_a_score_above_0(self, run, metric):
        rows = [prediction(k, "questions") | {"prediction": "z", "score": 30.0} for k in range(8)]
        write(run / "evaluations/cotbal/test/questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        table = json.loads((run / "tasks.json").read_text())
        table["tasks"][1]["metric"] = metric
        write(run / "tasks.json", table)
        found = page(run)
        assert found.words.count(f"{METRICS[metric].label} 30.0 Question") == 4
        assert found.words.count("✓ right") == found.words.count("✗ wrong") == 2  # the boxes' alone

    def test_sources(self, full):
        assert full.row("attributions", "Shared set") == [
            "Shared set", "A & B", "CC0", "captions, questions, boxes",
        ]  # fmt: skip

    def test_built_in_sources_are_named_without_being_listed(self, run):
        from trainer.config import BUILT_IN

        write(run / "config.yaml", f"tasks: {BUILT_IN}\n")
        table = {"tasks": [{"name": "grounding", "metric": "accuracy_iou", "auxiliary": False}]}
        write(run / "tasks.json", table)
        assert "CC-BY-SA-4.0" in page(run).row("attributions", "OpenMoji")

    def test_same_run_same_page(self, run):
        assert build_report(run).read_text() == build_report(run).read_text()
        assert not list(run.glob("*.partial"))

    @pytest.mark.parametrize("count", [1, 2])
    def test_few_tasks(self, run, count):
        few = TASKS[:count]
        weights = json.loads((run / "weights.json").read_text())
        results = json.loads((run / "results.json").read_text())
        weights["tasks"] = few
        weights["contribution"] = [row[:count] for row in weights["contribution"][:count]]
        for key in ("difficulty", *LAMBDAS):
            weights[key] = weights[key][:count]
        results["tasks"] = {task: results["tasks"][task] for task in few}
        for table in (results["baseline"], *results["methods"].values()):
            for task in TASKS[count:]:
                del table[task]
        write(run / "weights.json", weights)
        write(run / "results.json", results)
        write(run / "scores.json", {"tasks": few, "mini": {t: V_MINI[t] for t in few},
                                    "full": {i: {j: V_FULL[i][j] for j in few} for i in few}})  # fmt: skip
        found = page(run)
        assert "Could not be read" not in found.words
        assert len(found.tables["contributions"]) == count + 1


def test_smoothing_has_no_lag():
    line = [3.0 - 0.1 * k for k in range(40)]
    assert smooth(line) == pytest.approx(line, abs=1e-12)
    assert smooth([1.0]) == [1.0]
    assert smooth([0.0, 3.0, 0.0], share=0.34) == pytest.approx([0.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("value", "floor", "error", "direction", "expected"),
    [
        (0.0, 0.0, 0.0, "higher", 0.0),  # nothing right, where the constant has nothing right either
        (100.0, 90.0, 0.0, "higher", math.inf),
        (0.0, 10.0, 0.0, "higher", -math.inf),
        (0.5, 0.25, 0.125, "higher", 2.0),
        (0.5, 0.25, 0.125, "lower", -2.0),
        (0.5, 0.25, None, "higher", None),
    ],
)
def test_advantage_in_standard_errors(value, floor, error, direction, expected):
    key = ("task", "EM")
    errors = {"EW": {key: error}} if error is not None else {}
    scores = ScoreTable({key: direction}, {"majority": {key: floor}, "EW": {key: value}}, errors)
    assert scores.advantage("EW", "majority", key) == expected


@pytest.mark.parametrize(
    ("scores", "label", "chosen"),
    [
        ([0, 0, 100, 0, 0, 0, 0, 0], "EM", [2, 1, 4, 6]),  # one right answer leaves three places
        ([100, 100, 0, 100, 100, 0, 100, 100], "EM", [1, 6, 2, 5]),
        ([100] * 8, "EM", [1, 3, 5, 7]),
        ([0, 100], "EM", [1, 0]),
        ([100, 100, 0, 100, 100, 0, 100, 100], "GQA acc.", [1, 6, 2, 5]),
        ([3, 0, 7, 1, 6, 2, 5, 4], "CIDEr", [4, 7, 5, 1]),  # of 7, 6, ..., 0 the middles of four quarters
        ([30, 0, 90, 10, 60, 20, 50, 40], "VQA acc.", [4, 7, 5, 1]),
    ],
)
def test_samples_are_spread_over_right_and_wrong_answers(scores, label, chosen):
    assert [row["id"] for row in choose([{"id": k, "score": s} for k, s in enumerate(scores)], label)] == chosen
