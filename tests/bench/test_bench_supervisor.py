"""A peer that hangs, crashes or loses the device is named and left out, and everybody else's results are kept."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as command_line
from bench import run, turns
from bench.cases import PRESETS
from bench.peers import OURS, all_peers
from bench.peers.eager import Eager
from bench.peers.vocabulary_chunks import VocabularyChunks
from bench.results import Run
from bench.run import note_stop
from bench.supervisor import LOST_DEVICE, overdue, supervise
from bench.turns import Turn

QUICK = PRESETS["quick"]
H200 = PRESETS["h200"]
# The command line with three peers and two small cases.
WORKER = """
import os, signal, sys, time
from dataclasses import replace
import bench.cases, bench.run
from bench.cases import HEADS, PRESETS, Head, LinearCase, LogitsCase
from bench.peers.eager import Eager
from bench.peers.vocabulary_chunks import VocabularyChunks

class Hanging(Eager):
    name = "torch.compile"
    def loss(self, *inputs):
        if inputs[0].requires_grad and not os.path.exists("calm"):
            time.sleep(600)
        return super().loss(*inputs)

class Crashing(Eager):
    name = "quack"
    def loss(self, *inputs):
        os.kill(os.getpid(), signal.SIGSEGV)

HEADS["odd"] = Head("odd", 517, 37)
cases = (LinearCase("odd", 50, dtype="float32", memory=False), LogitsCase(20, 99, dtype="float32"))
PRESETS["quick"] = replace(PRESETS["quick"], cases=cases, rounds=3)
bench.run.all_peers = lambda: [Eager(), Hanging(), Crashing()]
from bench.__main__ import main
sys.exit(main(["run", "--here", "--preset", "quick", *sys.argv[1:]]))
"""


def script(folder: Path, text: str) -> list[str]:
    path = folder / "worker.py"
    path.write_text(textwrap.dedent(text))
    return [sys.executable, str(path)]


def test_peers_that_hang_and_crash_are_left_out_and_the_others_measured(tmp_path: Path) -> None:
    results = tmp_path / "quick.json"
    said: list[str] = []
    # Long enough for a busy machine to import and run what is small.
    preset = replace(QUICK, turn_seconds=5.0)
    started = time.monotonic()
    assert supervise([*script(tmp_path, WORKER), "--out", str(tmp_path)], results, preset, said.append) == 0
    found = Run.read(results)
    linear, logits = found.rows
    hung, crashed = "did not end within 5 s", "ended its process: SIGSEGV"
    assert {entry.name: (entry.status, entry.error) for entry in linear.entries} == {
        "eager": ("ok", None),
        "torch.compile": ("failed", hung),
        "quack": ("failed", crashed),
    }
    assert len(linear.entries[0].samples) == 3
    # In the cases that follow they are not asked.
    assert {entry.name: (entry.status, entry.error) for entry in logits.entries} == {
        "eager": ("ok", None),
        "torch.compile": ("unavailable", f"left out: {hung} ({linear.label})"),
        "quack": ("unavailable", f"left out: {crashed} ({linear.label})"),
    }
    assert [line.split(": ", 1)[1] for line in said] == [
        f"torch.compile: {hung}; left out from here on",
        f"quack: {crashed}; left out from here on",
    ]
    # What was waited for is time of the run.
    assert 5 < 60 * found.environment["minutes"] < time.monotonic() - started
    assert {path.name for path in tmp_path.iterdir()} == {"quick.json", "worker.py"}


def test_what_the_run_says_itself_is_its_end(tmp_path: Path) -> None:
    said: list[str] = []
    for status in (0, 1, 2):
        # A turn of an earlier run, which has been under way for a long time, is not this run's.
        turns.file_of(tmp_path / "quick.json").write_text(json.dumps(["old"]))
        command = script(tmp_path, f"import sys, time; time.sleep(0.5); sys.exit({status})")
        assert supervise(command, tmp_path / "quick.json", QUICK, said.append) == status
    assert said == []
    assert supervise(script(tmp_path, "import sys; sys.exit(3)"), tmp_path / "quick.json", QUICK, said.append) == 1
    assert said == ["bench: before its first case the run ended its process: exit status 3"]


def test_a_lost_device_is_a_reason_to_go_on_in_another_process(tmp_path: Path) -> None:
    command = script(
        tmp_path,
        f"""
        import sys
        with open({str(tmp_path / "log")!r}, "a") as log:
            log.write(" ".join(sys.argv[1:]) + ";")
        sys.exit(0 if "--resume" in sys.argv else {LOST_DEVICE})
        """,
    )
    assert supervise([*command, "--out", "x"], tmp_path / "quick.json", QUICK, pytest.fail) == 0
    assert (tmp_path / "log").read_text() == "--out x;--out x --resume;"


def test_a_run_that_is_ended_ends_what_it_started(tmp_path: Path) -> None:
    """As by ``timeout``: the process that measures would go on with the device."""
    pid = tmp_path / "pid"
    worker = script(tmp_path, f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    lines = ["from pathlib import Path", "from bench.cases import PRESETS", "from bench.supervisor import supervise"]
    lines.append(f"supervise({worker}, Path({str(tmp_path / 'quick.json')!r}), PRESETS['quick'])")
    outer = subprocess.Popen([sys.executable, "-c", "\n".join(lines)], start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()):
            assert time.monotonic() < end
            time.sleep(0.05)
        outer.terminate()
        assert outer.wait(30) == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
    finally:
        outer.kill()


def turn_of(peer: str | None, case: str = QUICK.cases[0].label, began: float = 0.0) -> Turn:
    return Turn(case, peer, began, started=0.0)


def test_what_is_overdue() -> None:
    assert overdue(turn_of("quack"), H200, 120.0) is None
    assert overdue(turn_of("quack"), H200, 121.0) == (turn_of("quack"), "did not end within 120 s")
    # The time of the run bounds the last turns; who is on turn then need not be the one that took it.
    late = turn_of("quack", began=8 * 60 - 1)
    assert overdue(late, H200, 9 * 60 - 1) is None
    assert overdue(late, H200, 9 * 60 + 1) == (
        replace(late, peer=None),
        "out of time: the run was ended after 9 minutes",
    )
    assert overdue(turn_of("quack"), QUICK, 899.0) is None  # a preset without an end


@pytest.mark.parametrize("peer", [None, "floor: products", OURS, "quack"])
def test_a_stop_that_no_peer_can_be_left_out_for_skips_the_case(tmp_path: Path, peer: str | None) -> None:
    """Neither a floor nor ours; nor a peer that is out already: otherwise the next process would stop there again."""
    path = tmp_path / "quick.json"
    case = QUICK.cases[1]
    out = {"quack": {"case": "earlier", "error": "hung"}}
    Run("quick", "a command", "now", {"left out": dict(out)}).write(path)
    said = note_stop(path, QUICK, turn_of(peer, case.label), peer, "did not end")
    found = Run.read(path)
    assert found.environment["left out"] == out
    assert [(row.label, row.skipped) for row in found.rows] == [
        (case.label, f"{peer}: did not end" if peer else "did not end")
    ]
    assert found.rows[0].skipped in said


@pytest.mark.parametrize("last", [1, 2, 4], ids=["check", "first round", "third round"])
def test_losing_the_device_leaves_out_who_did_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], last: int
) -> None:
    """Everything fails from then on, what frees memory too; in the rounds others of the table's upper lines as well."""
    calls: list[str] = []

    def require_device() -> None:
        if calls.count("quack") == last:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class Usual(Eager):
        def loss(self, *inputs: Any) -> torch.Tensor:
            calls.append(self.name)
            require_device()
            return super().loss(*inputs)

    class Culprit(Usual):
        name = "quack"

    case = replace(QUICK.cases[0], M=16)
    monkeypatch.setattr(run, "all_peers", lambda: [Usual(), Culprit(), VocabularyChunks()])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", require_device)
    monkeypatch.setitem(PRESETS, "quick", replace(QUICK, cases=(case,), rounds=5, warmup=0))
    assert command_line.main(["run", "--here", "--out", str(tmp_path)]) == LOST_DEVICE
    turns.end()
    found = Run.read(tmp_path / "quick.json")
    error = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert found.environment["left out"] == {"quack": {"case": case.label, "error": error}}
    assert found.rows == []
    assert calls[-1] == "quack"
    assert "quack" in capsys.readouterr().out


def test_everybody_who_works_has_a_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hanging peer is blamed by the file: the last name in it is whoever works."""
    taken: list[str | None] = []
    take = turns.take

    def recorded(peer: str | None) -> None:
        taken.append(peer)
        take(peer)

    monkeypatch.setattr(turns, "take", recorded)
    names = [OURS, "eager"]
    peers = [peer for peer in all_peers() if peer.name in names]
    monkeypatch.setattr(run, "all_peers", lambda: peers)
    linear, _, model = (
        next(case for case in QUICK.cases if case.suite == suite) for suite in ("linear", "logits", "model")
    )
    for case, extra in ((replace(linear, M=16), ["floor: products", "floor: copy"]), (model, [])):
        taken.clear()
        preset = replace(QUICK, cases=(case,), rounds=1, warmup=0)
        run.run_preset(preset, run.torch.device("cpu"), "a command", tmp_path / "quick.json", lambda _: None)
        assert taken == [None, *names, *names, *extra]
    assert not turns.file_of(tmp_path / "quick.json").exists()
