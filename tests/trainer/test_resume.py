"""The whole pipeline killed with SIGKILL inside a proxy training and again inside an evaluation ends the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from machines import survivors

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


@pytest.mark.skipif(sys.platform != "linux", reason="a process can ask to end with its parent on Linux only")
def test_killed_twice_and_resumed_gives_the_same_weights(run_data: dict[str, Any], tmp_path: Path) -> None:
    run_data["training"] |= {"epochs": 3, "learning_rate": 1e-2, "save_steps": 2, "logging_steps": 1}
    run_data["cotbal"] |= {"on_degenerate": "clip"}
    run_data["comparisons"] = []
    directories = {}
    configs = {}
    for name in ("whole", "killed"):
        directories[name] = tmp_path / name
        configs[name] = tmp_path / f"{name}.yaml"
        configs[name].write_text(yaml.safe_dump(run_data | {"output_dir": str(directories[name])}))
    finish(configs["whole"])

    killed = directories["killed"]
    proxy = killed / "trainings" / "plus-colour"
    kill_when(configs["killed"], lambda: any((proxy / "checkpoints").glob("checkpoint-*/COMPLETE")))
    assert status(killed, "train-plus-colour") == "running"
    deadline = time.monotonic() + 60
    while survivors(killed):  # training processes end with the one that was killed
        assert time.monotonic() < deadline, survivors(killed)
        time.sleep(0.2)
    finished_before = (killed / "stages" / "train-mini.json").read_text()

    # Ranks have started; `test_evaluation.py` kills between two batches.
    scored = killed / "evaluations" / "plus-box" / "validation"
    kill_when(configs["killed"], lambda: any((scored / "parts").glob("rank-*.jsonl")))
    assert status(killed, "score-plus-box") == "running"
    assert status(killed, "train-plus-box") == "done"
    finish(configs["killed"])

    assert (killed / "stages" / "train-mini.json").read_text() == finished_before, "a finished stage ran again"
    for name in ("scores.json", "weights.json", "results.json"):
        assert json.loads((killed / name).read_text()) == json.loads((directories["whole"] / name).read_text()), name
    for task in ("colour", "box"):
        name = f"evaluations/plus-box/validation/{task}.jsonl"
        assert (killed / name).read_bytes() == (directories["whole"] / name).read_bytes()
    assert not (scored / "parts").exists()
    whole, resumed = (
        [json.loads(line) for line in (folder / "trainings/plus-colour/log.jsonl").read_text().splitlines()]
        for folder in directories.values()
    )
    assert [(line["step"], line["loss"]) for line in resumed] == [(line["step"], line["loss"]) for line in whole]
    assert (killed / "report.html").exists()
