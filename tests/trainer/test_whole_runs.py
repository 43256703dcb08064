"""Whole runs: one that is killed and continued, and one on two machines, end as one that nothing happened to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from machines import Machines, assert_equal_models, survivors, write
from small_run import small_run

from trainer.task_config import TaskConfig

pytestmark = pytest.mark.slow


def command(config: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.cli", "run", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(config: Path) -> None:
    process = command(config)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors.decode()[-4000:]


def kill_when(config: Path, reached: Callable[[], bool]) -> None:
    """Starts the run and kills it, with nothing but SIGKILL to its first process, once `reached` says so."""
    process = command(config)
    deadline = time.monotonic() + 600
    while not reached():
        if process.poll() is not None:
            assert process.stderr is not None
            pytest.fail(f"the run ended before it could be killed: {process.stderr.read().decode()[-3000:]}")
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def status(run_dir: Path, stage: str) -> str | None:
    try:
        return json.loads((run_dir / "stages" / f"{stage}.json").read_text())["status"]
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class Whole:
    """A run on one machine without an interruption, and its configuration for another folder."""

    run_dir: Path
    data: dict[str, Any]

    def config(self, folder: Path, **launch: Any) -> Path:
        data = self.data | {"output_dir": str(folder), "launch": self.data["launch"] | launch}
        return write(folder.with_suffix(".yaml"), data)


@pytest.fixture(scope="module")
def whole(tiny_tasks: list[TaskConfig], pixel_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    data = small_run(tiny_tasks, pixel_model, run_dir)
    data["training"] |= {"epochs": 3, "learning_rate": 1e-2, "save_steps": 2, "logging_steps": 1}
    data["cotbal"] |= {"on_degenerate": "clip"}
    data["comparisons"] = []
    found = Whole(run_dir, data)
    finish(found.config(run_dir))
    return found


def assert_same_results(found: Path, expected: Path) -> None:
    for name in ("scores.json", "weights.json", "results.json"):
        assert json.loads((found / name).read_text()) == json.loads((expected / name).read_text()), name


def test_trainings_spread_over_two_machines_end_as_on_one(whole: Whole, tmp_path: Path) -> None:
    """Bit for bit: which machine trains and scores a model changes nothing."""
    two = tmp_path / "two"
    said = Machines(2).run("run", whole.config(two, nodes=2))
    assert "all 2 machines are here" in said[0]
    done_there = {line.split(": ", 1)[1].split("/")[0] for line in said[1].splitlines() if "node 1: " in line}
    assert {"trainings", "evaluations"} <= done_there, said[1]
    assert_same_results(two, whole.run_dir)
    for training in ("mini", "plus-colour", "plus-box", "cotbal"):
        assert_equal_models(two / "trainings" / training / "model", whole.run_dir / "trainings" / training / "model")


@pytest.mark.skipif(sys.platform != "linux", reason="a process can ask to end with its parent on Linux only")
def test_killed_twice_and_resumed_gives_the_same_weights(whole: Whole, tmp_path: Path) -> None:
    """With SIGKILL, inside a proxy training and again inside an evaluation."""
    killed = tmp_path / "killed"
    config = whole.config(killed)
    proxy = killed / "trainings" / "plus-colour"
    kill_when(config, lambda: any((proxy / "checkpoints").glob("checkpoint-*/COMPLETE")))
    assert status(killed, "train-plus-colour") == "running"
    deadline = time.monotonic() + 60
    while survivors(killed):  # training processes end with the one that was killed
        assert time.monotonic() < deadline, survivors(killed)
        time.sleep(0.2)
    finished_before = (killed / "stages" / "train-mini.json").read_text()

    # Ranks have started; `test_evaluation.py` kills between two batches.
    scored = killed / "evaluations" / "plus-box" / "validation"
    kill_when(config, lambda: any((scored / "parts").glob("rank-*.jsonl")))
    assert status(killed, "score-plus-box") == "running"
    assert status(killed, "train-plus-box") == "done"
    finish(config)

    assert (killed / "stages" / "train-mini.json").read_text() == finished_before, "a finished stage ran again"
    assert_same_results(killed, whole.run_dir)
    for task in ("colour", "box"):
        name = f"evaluations/plus-box/validation/{task}.jsonl"
        assert (killed / name).read_bytes() == (whole.run_dir / name).read_bytes()
    assert not (scored / "parts").exists()
    uninterrupted, resumed = (
        [json.loads(line) for line in (folder / "trainings/plus-colour/log.jsonl").read_text().splitlines()]
        for folder in (whole.run_dir, killed)
    )
    losses = [(line["step"], line["loss"]) for line in uninterrupted]
    assert [(line["step"], line["loss"]) for line in resumed] == losses
    assert (killed / "report.html").exists()
