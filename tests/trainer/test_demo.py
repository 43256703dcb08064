"""The main job at a reduced size: ``cotbal demo --small`` from nothing to the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainer.balancing.cotbal import cotbal_weights
from trainer.balancing.scores import Scores
from trainer.comparison import compare_to_json
from trainer.data.built_in import BUILT_IN_TASKS
from trainer.metrics import get_metric

pytestmark = pytest.mark.slow
TASKS = [task.name for task in BUILT_IN_TASKS if not task.auxiliary]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "trainer.cli", "demo", "--small", "--output", str(directory)],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"report: {directory / 'report.html'}" in done.stdout
    return directory


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_every_training_of_algorithm_1_ran_and_was_scored(run_dir: Path) -> None:
    proxies = ["mini", *(f"plus-{name}" for name in TASKS)]
    finals = ["cotbal", "ew", *(f"stl-{name}" for name in TASKS)]
    assert {path.name for path in (run_dir / "trainings").iterdir()} == {"pretraining", *proxies, *finals}
    for name in proxies:
        assert set(read(run_dir / "evaluations" / name / "validation" / "metrics.json")) == set(TASKS)
    stages = {path.stem: read(path) for path in (run_dir / "stages").glob("*.json")}
    assert {stage["status"] for stage in stages.values()} == {"done"}
    assert len(stages) == 8 + 2 * len(proxies) + 2 * len(finals)


def test_scores_weights_and_results_follow_from_the_predictions(run_dir: Path) -> None:
    """From prediction files to lambda and results, by the library's functions that have oracles of their own."""

    def value(name: str, split: str, task: str) -> float:
        lines = (run_dir / "evaluations" / name / split / f"{task}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        metric = get_metric({info.name: info.metric for info in BUILT_IN_TASKS}[task])
        predictions = [row["prediction"].strip() for row in rows]  # blanks at the ends count in no metric
        return metric.compute(predictions, [row["references"] for row in rows]).value

    scores = read(run_dir / "scores.json")
    assert scores["tasks"] == TASKS
    for j in TASKS:
        assert scores["mini"][j] == pytest.approx(value("mini", "validation", j))
        for i in TASKS:
            assert scores["full"][i][j] == pytest.approx(value(f"plus-{i}", "validation", j))
    weights = read(run_dir / "weights.json")
    expected = cotbal_weights(Scores.from_json(scores), 0.5, 0.5, "clip").weights
    np.testing.assert_allclose(weights["weights"], expected)
    np.testing.assert_allclose(np.mean(weights["weights"]), 1.0)
    results = read(run_dir / "results.json")
    assert set(results["methods"]) == {"CoTBal", "EW"}
    for j in TASKS:
        label = next(iter(results["tasks"][j]))
        assert results["methods"]["CoTBal"][j][label] == pytest.approx(value("cotbal", "test", j))
        assert results["baseline"][j][label] == pytest.approx(value(f"stl-{j}", "test", j))


def test_the_final_training_used_the_weights(run_dir: Path) -> None:
    weights = read(run_dir / "weights.json")
    expected = dict(zip(weights["tasks"], weights["weights"], strict=True)) | {"chat": 1.0}
    seen: dict[str, float] = {}
    for line in (run_dir / "trainings" / "cotbal" / "log.jsonl").read_text().splitlines():
        seen |= {task: entry["weight"] for task, entry in json.loads(line)["tasks"].items()}
    assert seen == {task: pytest.approx(value) for task, value in expected.items()}


def test_loss_falls(run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "trainings" / "ew" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_a_second_run_does_nothing_again(run_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "stages").glob("*.json")}
    done = subprocess.run(
        [sys.executable, "-m", "trainer.cli", "demo", "--small", "--output", str(run_dir)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "stages").glob("*.json")} == before


def test_compare_reads_the_results_or_says_what_is_in_the_way(run_dir: Path) -> None:
    results = read(run_dir / "results.json")
    if min(value for metrics in results["baseline"].values() for value in metrics.values()) > 0:
        assert set(compare_to_json(results)) == {"CoTBal", "EW"}
    else:  # a model this small may get nothing right in a task
        with pytest.raises(ValueError, match="divides by the baseline"):
            compare_to_json(results)
