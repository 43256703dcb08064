"""A training on two machines equals one on one machine, and runs survive the loss of either."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from machines import Machines, assert_equal_models, survivors, write

from trainer.loop.checkpoints import COMPLETE

pytestmark = pytest.mark.slow


@pytest.fixture
def data(run_data: dict[str, Any]) -> dict[str, Any]:
    """The run without comparisons, with weights that training moves."""
    run_data["training"] |= {"epochs": 2, "learning_rate": 1e-2, "logging_steps": 1}
    run_data["cotbal"] |= {"on_degenerate": "clip"}
    run_data["comparisons"] = []
    return run_data


def with_launch(data: dict[str, Any], folder: Path, **launch: Any) -> dict[str, Any]:
    return data | {"output_dir": str(folder), "launch": data["launch"] | launch}


def newest_step(folder: Path) -> int:
    """Of the complete checkpoints of a training."""
    return max((int(path.parent.name.split("-")[1]) for path in folder.glob(f"checkpoints/*/{COMPLETE}")), default=0)


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_training_on_two_machines(data: dict[str, Any], tmp_path: Path) -> None:
    """Equals two processes of one machine, bit for bit. Either machine's death ends it on both, and it goes on."""
    data["training"] |= {"epochs": 30, "save_steps": 2, "zero_stage": 2}
    alone = write(tmp_path / "one.yaml", with_launch(data, tmp_path / "run", processes=2))
    both = write(tmp_path / "two.yaml", with_launch(data, tmp_path / "run", nodes=2, nodes_per_training=2))
    command = ["train", alone, "--method", "rlw", "--output", tmp_path / "one"]
    subprocess.run([sys.executable, "-m", "trainer.cli", *map(str, command)], check=True, capture_output=True)

    two = tmp_path / "two"
    for victim in (1, 0):
        machines = Machines(2)
        machines.start("train", both, "--method", "rlw", "--output", two)
        before = newest_step(two)
        until(lambda before=before: newest_step(two) > before)
        machines.processes[victim].kill()
        ended = machines.wait()
        assert ended[1 - victim][0] == 2, ended[1 - victim][1]
        said = ended[1 - victim][1].splitlines()[-1]
        if victim == 0:
            assert said.startswith("cotbal: contact with node 0"), said
        until(lambda: not survivors(two))
        assert not (two / "model").exists()
    Machines(2).run("train", both, "--method", "rlw", "--output", two)
    assert_equal_models(two / "model", tmp_path / "one" / "model")
    assert (two / "weights.csv").read_text() == (tmp_path / "one" / "weights.csv").read_text()
    assert (two / "output.node1.log").exists()


def test_what_goes_wrong_on_another_machine_is_told_by_node_0(data: dict[str, Any], tmp_path: Path) -> None:
    """A training of node 1 alone fails; node 1 is lost while it has work; both name it, and both machines end."""
    data["comparisons"] = ["ew"]
    config = write(tmp_path / "run.yaml", with_launch(data, tmp_path / "run", nodes=2))
    machines = Machines(2)
    machines.start("run", config)
    until(lambda: any((tmp_path / "run" / "trainings").glob("*/output.log")))
    machines.processes[1].kill()
    ended = machines.wait()
    assert ended[0][0] == 2
    assert "node 1 (" in ended[0][1].splitlines()[-1], ended[0][1]
    assert "has not been heard of" in ended[0][1].splitlines()[-1]


def test_a_machine_that_node_0_does_not_answer_ends_with_its_training(data: dict[str, Any], tmp_path: Path) -> None:
    """Its connection is whole, as when node 0 has lost power or its network: nothing tells it so."""
    data["training"] |= {"epochs": 200}
    config = write(tmp_path / "run.yaml", with_launch(data, tmp_path / "run", nodes=2))
    machines = Machines(2)
    machines.start("run", config)
    try:
        until(lambda: len(list((tmp_path / "run" / "trainings").glob("*/log.jsonl"))) == 2)
        machines.processes[0].send_signal(signal.SIGSTOP)
        assert machines.processes[1].wait(60) == 2
        until(lambda: len(survivors(tmp_path / "run")) == 1)  # node 0's own
    finally:
        machines.processes[0].kill()
        (_, (_, said)) = machines.wait()
    assert "node 0 has not answered for 5 s" in said.splitlines()[-1]
    until(lambda: not survivors(tmp_path / "run"))
