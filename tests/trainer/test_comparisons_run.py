"""A whole run with comparisons, an ablation and seeds: stages, weights, results and report. Trainings are replaced by
what they leave behind, evaluations by scores that follow from the training's name; everything between is real."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stand_ins import BALANCED, Runs, answers, read, score
from synthetic_run import Page

from trainer.balancing.cotbal import cotbal_weights
from trainer.balancing.resampling import Influences, resampled
from trainer.balancing.scores import Scores
from trainer.comparison import compare
from trainer.training import TrainingSpec


def score_error(training: str, task: str) -> float:
    """Of the four answers; all alike, that of Wilson's interval."""
    right = [100.0 * own for own in answers(training, task)]
    return statistics.stdev(right) / 2 or 100 * 2 / (4 + 4)


COMPARED = ["stl", "ew", "coba", "cotbal_precise", {"name": "hot", "method": "cotbal", "options": {"temperature": 5.0}}]


def test_rows_of_every_method_with_means_over_seeds(run_stand_ins: Callable[..., Path], runs: Runs) -> None:
    run_dir = run_stand_ins(comparisons=COMPARED, seeds=3)
    finals = ["cotbal", "ew", "coba", "cotbal_precise", "hot", "stl-colour", "stl-box"]
    expected = ["mini", "plus-colour", "plus-box", "alone-colour", "alone-box"]
    expected += finals + [f"{name}@{number}" for name in finals for number in (1, 2)]
    assert sorted(runs.trained) == sorted(expected)

    for name in expected:
        spec = TrainingSpec.model_validate_json((run_dir / "trainings" / name / "spec.json").read_text())
        assert spec.seed == int(name.partition("@")[2] or 0)

    results = read(run_dir / "results.json")
    labels = {"CoTBal": "cotbal", "EW": "ew", "CoBa": "coba", "CoTBal precise D": "cotbal_precise", "hot": "hot"}
    assert set(results["methods"]) == set(labels)
    for label, name in labels.items():
        each = [{task: score(f"{name}{mark}", task) for task in BALANCED} for mark in ("", "@1", "@2")]
        assert [{task: row[task]["EM"] for task in BALANCED} for row in results["seeds"][label]] == each
        for task in BALANCED:
            mean = statistics.fmean(row[task] for row in each)
            assert results["methods"][label][task]["EM"] == pytest.approx(mean)
    single = [score(f"stl-colour{mark}", "colour") for mark in ("", "@1", "@2")]
    assert results["baseline"]["colour"]["EM"] == pytest.approx(statistics.fmean(single))

    page = Page((run_dir / "report.html").read_text())
    for label in labels:
        each = [compare({**results, "methods": {"x": table}})["x"] for table in results["seeds"][label]]
        gains, errors = [seed.delta_i for seed in each], [seed.delta_e for seed in each]
        (row,) = [row for row in page.tables["deltas"] if row[0] == label]
        sampling = results["sampling_errors"][label]["delta_i"]
        assert row[1] == f"{statistics.fmean(gains):+.2f} ± {sampling:.2f}seeds ± {statistics.stdev(gains):.2f}"
        assert row[2] == f"{statistics.fmean(errors):.2f}seeds ± {statistics.stdev(errors):.2f}"
        ours = compare({**results, "methods": dict(enumerate(results["seeds"]["CoTBal"]))})
        apart = [ours[seed].delta_i - gain for seed, gain in enumerate(gains)]
        sampling = results["sampling_errors"][label].get("behind_final", 0.0)
        behind = f"{statistics.fmean(apart):+.2f} ± {sampling:.2f}seeds ± {statistics.stdev(apart):.2f}"
        assert row[3] == (behind if label != "CoTBal" else "–")
    for task in BALANCED:
        header, row = page.tables["test-scores"][0], page.row("test-scores", task)
        for label, name in (labels | {"STL": f"stl-{task}"}).items():
            each_seed = [score(f"{name}{mark}", task) for mark in ("", "@1", "@2")]
            mean, deviation = statistics.fmean(each_seed), statistics.stdev(each_seed)
            cell = row[header.index(label)].removesuffix("at chance")
            error = statistics.fmean(score_error(f"{name}{mark}", task) for mark in ("", "@1", "@2"))
            assert cell == f"{mean:.1f} ± {error:.1f}seeds ± {deviation:.1f}", label
    assert "those about one image together, and the standard deviation over 3 seeds; the best" in page.words
    assert "3 seeds." in page.words
    assert "from seed to seed it is" in page.words
    assert page.row("moving-weights", "CoBa")[1:] == ["1.25 (1.10–1.40)", "0.75 (0.60–0.90)"]
    assert [row[0] for row in page.tables["moving-weights"][1:]] == ["CoBa"]


def test_seeds_without_single_task_models(run_stand_ins: Callable[..., Path]) -> None:
    """Scores have their spread although there is no Delta I."""
    page = Page((run_stand_ins(comparisons=["ew"], seeds=2) / "report.html").read_text())
    first, second = score("ew", "colour"), score("ew@1", "colour")
    cell = page.row("test-scores", "colour")[page.tables["test-scores"][0].index("EW")].removesuffix("at chance")
    error = (score_error("ew", "colour") + score_error("ew@1", "colour")) / 2
    assert cell == f"{(first + second) / 2:.1f} ± {error:.1f}seeds ± {abs(first - second) / 2**0.5:.1f}"
    assert "2 seeds." in page.words


def test_an_unknown_standard_error_is_null(run_stand_ins: Callable[..., Path], runs: Runs) -> None:
    """Of one test record, say. JSON has no NaN."""
    runs.samples = 1
    text = (run_stand_ins(comparisons=["ew"]) / "results.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)
    assert results["standard_errors"]["EW"] == {task: {"EM": None} for task in BALANCED}


def test_a_method_that_never_moved_its_weights_is_named(run_stand_ins: Callable[..., Path]) -> None:
    """The stand-in for a training moves those of CoBa only."""
    page = Page((run_stand_ins(comparisons=["ew", "igbv1", "coba"]) / "report.html").read_text())
    assert "IGBv1 kept the same weights for the whole training" in page.words
    assert [row[0] for row in page.tables["moving-weights"][1:]] == ["CoBa"]


def moved(task: str, precise: bool) -> Influences:
    """By the answers of the models that Eq. 3-9 compare on a task."""
    models = ["mini", *(f"plus-{name}" for name in BALANCED), *([f"alone-{task}", f"stl-{task}"] if precise else [])]
    right = [100.0 * np.array(answers(training, task)) for training in models]
    n = len(right[0])
    unseen = [100 * 2 / (n + 4) if row.mean() in (0, 100) else 0.0 for row in right]
    return Influences(np.array([row - row.mean() for row in right]), np.array(unseen))


def test_ablations_have_weights_of_their_own(run_stand_ins: Callable[..., Path]) -> None:
    run_dir = run_stand_ins(comparisons=COMPARED)
    table = read(run_dir / "scores.json")
    assert table["mini"] == {task: score("mini", task) for task in BALANCED}
    precise = {
        "mini": {task: score(f"alone-{task}", task) for task in BALANCED},
        "full": {task: score(f"stl-{task}", task) for task in BALANCED},
    }
    tables = {"reused": Scores.from_json(table), "precise": Scores.from_json(table | {"alone": precise})}
    expected = {
        "cotbal": cotbal_weights(tables["reused"]),
        "hot": cotbal_weights(tables["reused"], temperature=5.0),
        "cotbal_precise": cotbal_weights(tables["precise"], difficulty="precise"),
    }
    for name, weights in expected.items():
        file = run_dir / ("weights.json" if name == "cotbal" else f"weights/{name}.json")
        assert read(file)["applied"] == weights.weights.tolist()
        kind = "precise" if "precise" in name else "reused"
        options = {"temperature": weights.temperature, "difficulty": kind}
        errors = resampled(tables[kind], [moved(task, kind == "precise") for task in BALANCED], **options)
        assert read(file)["sampling_errors"] == errors
        spec = TrainingSpec.model_validate_json((run_dir / "trainings" / name / "spec.json").read_text())
        assert spec.task_weights == dict(zip(BALANCED, weights.weights.tolist(), strict=True))
    page = Page((run_dir / "report.html").read_text())
    assert len(page.tables["variants"]) == 3
    for label, name, temperature in (("hot", "hot", "5.0"), ("CoTBal precise D", "cotbal_precise", "0.5")):
        each = zip(expected[name].weights, expected[name].difficulty, strict=True)
        cells = [f"{weight:.3f}D {difficulty:.3f}" for weight, difficulty in each]
        assert page.row("variants", label) == [label, temperature, "0.5", "cotbal", *cells]
    # Eq. 9 by hand.
    d = [1 - precise["mini"][task] / precise["full"][task] for task in BALANCED]
    assert read(run_dir / "weights" / "cotbal_precise.json")["difficulty"] == pytest.approx(d)
