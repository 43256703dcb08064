"""Evaluation at scale: ranks, kills and restarts leave the same files."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from questions import COUNT

import trainer.evaluation.progress as progress
import trainer.evaluation.running as running
from trainer.errors import UserError
from trainer.evaluation.generation import BatchScorer
from trainer.evaluation.parts import Finished, no_ranks
from trainer.evaluation.progress import Display, Meter
from trainer.evaluation.ranks import RankProcesses, measure, run_rank
from trainer.evaluation.running import evaluate
from trainer.evaluation.spec import EvaluationSet, EvaluationSpec


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankProcesses]:
    with closing(RankProcesses(2)) as processes:
        yield processes


class TestRanks:
    @pytest.mark.slow  # starts a process
    def test_a_rank_that_is_starting_does_not_die_of_a_scheduler_s_warning(self, two_ranks: RankProcesses) -> None:
        blocked = two_ranks.submit(0, signal.pthread_sigmask, signal.SIG_BLOCK, ()).result()
        assert blocked == {signal.SIGUSR1}

    @pytest.mark.slow  # starts two processes
    def test_two_give_the_same_files_as_one(
        self,
        make_spec: Callable[..., EvaluationSpec],
        answers: Path,
        two_ranks: RankProcesses,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Losses as well as answers: their last bits tell with which neighbours a record went through the model. Both
        measure records too, so that none waits for minutes."""
        submit, measured = two_ranks.submit, []

        def noted(rank: int, work: Callable[..., Any], *arguments: Any) -> Any:
            measured.extend([rank] if work is measure else [])
            return submit(rank, work, *arguments)

        monkeypatch.setattr(two_ranks, "submit", noted)
        losses = evaluate(make_spec(tmp_path / "one", metrics=("perplexity",)))
        for name, reference, metrics in (
            ("answers", answers, ("exact_match",)),
            ("losses", tmp_path / "one", ("perplexity",)),
        ):
            wrote: set[str] = set()

            def look(meter: Meter, output: Path = tmp_path / name, wrote: set[str] = wrote) -> None:
                wrote |= {path.name for path in (output / "parts").glob("rank-*") if path.stat().st_size}

            evaluate(make_spec(tmp_path / name, metrics=metrics, devices=("cpu", "cpu")), two_ranks, look)
            assert wrote == {"rank-0.jsonl", "rank-1.jsonl"}
            assert measured == [0, 1]
            measured.clear()
            found, wanted = ((folder / "predictions.jsonl").read_bytes() for folder in (tmp_path / name, reference))
            assert found == wanted
        metrics_of_two = json.loads((tmp_path / "losses" / "metrics.json").read_text())
        assert metrics_of_two["metrics"] == losses["metrics"]

    @pytest.mark.slow
    def test_an_error_in_one_ends_all_and_keeps_what_is_done(
        self, make_spec: Callable[..., EvaluationSpec], answers: Path, two_ranks: RankProcesses, tmp_path: Path,
        questions: Path,
    ) -> None:  # fmt: skip
        shutil.copytree(questions, tmp_path / "data")
        spec = make_spec(tmp_path / "out", devices=("cpu", "cpu"))
        chosen = replace(spec.sets[0], files=(tmp_path / "data/mixed.jsonl",), image_root=tmp_path / "data")
        spec = replace(spec, sets=(chosen,))
        shortest = tmp_path / "data/images/7.png"  # "r7" is in the last batch
        image = shortest.read_bytes()
        shortest.write_bytes(b"no picture")
        with pytest.raises(ValueError, match=r"set 'predictions', record 'r7': .*7.png cannot be decoded"):
            evaluate(spec, two_ranks)
        shortest.write_bytes(image)
        before: list[int] = []
        evaluate(spec, two_ranks, lambda meter: before.append(meter.before))
        assert before[0] >= 4
        assert (tmp_path / "out/predictions.jsonl").read_bytes() == (answers / "predictions.jsonl").read_bytes()

    def test_one_that_hangs_is_named_and_costs_its_batch(
        self, make_spec: Callable[..., EvaluationSpec], answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Rank 1, at its first batch; rank 0 does the others. Alone, it may take its time: nobody waits for it."""
        ended = []

        class Processes:
            late = 0.0

            def submit(self, rank: int, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
                return thread.submit(self.work, work, *arguments) if work is not run_rank or rank == 0 else Future()

            def work(self, work: Callable[..., Any], *arguments: Any) -> Any:
                time.sleep(self.late if work is run_rank else 0)
                return work(*arguments)

            def end(self) -> None:
                ended.append(True)

        notes: list[str] = []
        for name, value in (("_POLL", 0.05), ("_PATIENCE", 0.4), ("_GOODBYE", 0.0)):
            monkeypatch.setattr(running, name, value)
        monkeypatch.setattr(progress, "SILENCE", 0.2)
        spec, processes = make_spec(tmp_path, devices=("cpu", "cpu")), Processes()
        hangs = rf"rank 1 of the evaluation into {tmp_path} hangs, or its GPU .* for 0\.4 s;"
        with ThreadPoolExecutor(1) as thread:
            with pytest.raises(UserError, match=hangs):
                evaluate(spec, processes, lambda meter: notes.append(meter.rates()))  # type: ignore[arg-type]
            assert ended == [True]
            assert re.fullmatch(r"[^,]* samples/s, .*, waiting for rank 1, no batch has ended for \d\.\d s", notes[-1])
            notes.clear()
            processes.late = 0.8
            spec = replace(spec, devices=("cpu",))
            evaluate(spec, processes, lambda meter: notes.append(f"{meter.total - meter.before} {meter.rates()}"))  # type: ignore[arg-type]
        assert any(re.fullmatch(r"4 no batch has ended for 0\.\d s", note) for note in notes)
        assert (tmp_path / "predictions.jsonl").read_bytes() == (answers / "predictions.jsonl").read_bytes()

    @pytest.mark.slow  # starts a process
    def test_an_interruption_waits_for_nothing_that_leaves_nothing(
        self, make_spec: Callable[..., EvaluationSpec], tmp_path: Path
    ) -> None:
        """Reading and measuring a hundred thousand records takes long; the process is still starting here."""
        before = {process.pid for process in multiprocessing.active_children()}

        def stop(meter: Meter) -> None:
            assert meter.total == 0
            raise Stop

        with closing(RankProcesses(2)) as processes, pytest.raises(Stop):
            evaluate(make_spec(tmp_path, devices=("cpu", "cpu")), processes, stop)
        assert {process.pid for process in multiprocessing.active_children()} <= before
        assert not (tmp_path / "manifest.json").exists()

    def test_need_processes(self, make_spec: Callable[..., EvaluationSpec], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="2 ranks need processes"):
            evaluate(make_spec(tmp_path, devices=("cpu", "cpu")))


class Stop(Exception):
    """In place of a kill, where a test can do without one."""


def stop_after(batches: int) -> Callable[[Meter], None]:
    calls = []

    def report(meter: Meter) -> None:
        calls.append(meter.samples)
        if len(calls) > batches:
            raise Stop

    return report


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that go through a model in this process."""
    sizes: list[int] = []
    whole = BatchScorer.__call__

    def call(self: BatchScorer, chosen: EvaluationSet, encoded: Any) -> Any:
        sizes.append(len(encoded))
        return whole(self, chosen, encoded)

    monkeypatch.setattr(BatchScorer, "__call__", call)
    return sizes


class TestRestart:
    @pytest.mark.skipif(sys.platform != "linux", reason="a process can ask to end with its parent on Linux only")
    @pytest.mark.slow
    def test_killed_and_restarted_equals_uninterrupted(
        self, make_spec: Callable[..., EvaluationSpec], counted: list[int], tmp_path: Path, two_ranks: RankProcesses
    ) -> None:
        """SIGKILL to a real two-rank command in the middle of a set; then on one rank, and on two."""
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        spec = make_spec(killed, batch_size=1, devices=("cpu", "cpu"))
        evaluate(make_spec(whole, batch_size=1))
        ((chosen,), count) = spec.sets, COUNT
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer.cli", "evaluate", spec.model_path, "--records", chosen.files[0],
             "--image-root", chosen.image_root, "--metric", "exact_match", "--output", killed, "--batch-size", "1",
             "--precision", "fp32", "--device", "cpu", "--threads", "1", "--processes", "2", "--max-new-tokens", "9"],
            stdout=subprocess.DEVNULL, stderr=(tmp_path / "errors").open("w"),
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        deadline = time.monotonic() + 300
        while sum(path.read_bytes().count(b"\n") for path in (killed / "parts").glob("rank-*.jsonl")) < 2:
            if process.poll() is not None:
                pytest.fail(f"ended before it could be killed: {(tmp_path / 'errors').read_text()[-3000:]}")
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with no_ranks(killed):  # they have ended with it
            assert not (killed / "predictions.jsonl").exists()
        counted.clear()
        parts = sorted((killed / "parts").glob("rank-*.jsonl"))
        for path in parts:  # what a kill in the middle of a write leaves
            whole_lines = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]
            path.write_bytes(whole_lines + b'{"batch": 3, "results": [{"predic')
        finished = sum(path.read_bytes().count(b"\n") for path in parts)
        assert 2 <= finished < count
        other = tmp_path / "other"
        shutil.copytree(killed, other)

        evaluate(make_spec(killed, batch_size=1))
        assert len(counted) == count - finished, "what was finished was done again"
        evaluate(make_spec(other, batch_size=1, devices=("cpu", "cpu")), two_ranks)
        for output in (killed, other):
            assert (output / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
            found, wanted = (json.loads((folder / "metrics.json").read_text()) for folder in (output, whole))
            assert found["metrics"] == wanted["metrics"]
            for key in ("samples", "prompt_tokens", "generated_tokens", "padding_share"):
                assert found["throughput"][key] == wanted["throughput"][key]

    def test_a_cut_off_line_costs_its_batch_only(
        self, make_spec: Callable[..., EvaluationSpec], answers: Path, counted: list[int], tmp_path: Path
    ) -> None:
        spec = make_spec(tmp_path)
        with pytest.raises(Stop):
            evaluate(spec, None, stop_after(4))
        assert sum(counted) == 16
        part = tmp_path / "parts/rank-0.jsonl"
        lines = part.read_bytes().splitlines(keepends=True)
        part.write_bytes(b"".join(lines[:3]) + lines[3][:-1])  # only the end of the line is missing
        counted.clear()
        evaluate(spec)
        assert sum(counted) == COUNT - 12
        assert (tmp_path / "predictions.jsonl").read_bytes() == (answers / "predictions.jsonl").read_bytes()

    def test_goes_on_with_smaller_batches(
        self, make_spec: Callable[..., EvaluationSpec], answers: Path, counted: list[int], tmp_path: Path
    ) -> None:
        """What to do where memory runs out; once more, stopped again and with larger ones, nothing is lost either."""
        with pytest.raises(Stop):
            evaluate(make_spec(tmp_path), None, stop_after(2))
        assert counted == [4, 4]
        with pytest.raises(Stop):
            evaluate(make_spec(tmp_path, batch_size=3), None, stop_after(3))
        assert sum(counted) == 8 + 9
        assert json.loads((tmp_path / "manifest.json").read_text())["evaluation"]["batch_size"] == 3
        evaluate(make_spec(tmp_path, batch_size=8))
        assert (sum(counted), max(counted[2:])) == (COUNT, 3)
        assert (tmp_path / "predictions.jsonl").read_bytes() == (answers / "predictions.jsonl").read_bytes()

    def test_a_finished_one_is_scored_again_without_the_model(
        self, make_spec: Callable[..., EvaluationSpec], answers: Path, counted: list[int], tmp_path: Path
    ) -> None:
        shutil.copytree(answers, tmp_path / "copy")
        before = json.loads((answers / "metrics.json").read_text())
        found = evaluate(make_spec(tmp_path / "copy", metrics=("span_f1", "exact_match")))
        assert counted == []
        assert list(found["metrics"]) == ["span_f1", "exact_match"]
        assert found["metrics"]["exact_match"] == before["metrics"]["exact_match"]
        assert found["throughput"] == before["throughput"]

    def test_killed_between_the_merge_of_two_sets(
        self, make_spec: Callable[..., EvaluationSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = make_spec(tmp_path, limit=5, by_task=True)
        (own,) = spec.sets
        spec = replace(spec, sets=(replace(own, name="a"), replace(own, name="b", metrics=("span_f1",))))
        write = running.write_jsonl
        monkeypatch.setattr(running, "write_jsonl", lambda path, rows: write(path, rows) if path.stem == "a" else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(spec)
        monkeypatch.setattr(running, "write_jsonl", write)
        found = evaluate(spec)
        assert {name: (entry["metric"], entry["samples"]) for name, entry in found.items()} == {
            "a": ("EM", 5), "b": ("F1", 5),
        }  # fmt: skip
        assert not (tmp_path / "parts").exists()


def test_what_is_not_known_yet_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as report:
        report(Meter(0, 0))
    assert capsys.readouterr().err == ""


def test_a_standstill_counts_from_the_latest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    meter = Meter(2, 9)
    now[0] = 400.0
    assert meter.rates() == "no batch has ended for 6 min 40 s"
    meter.add(Finished(0, [{}] * 4, prompt_tokens=30, padded_tokens=40, generated_tokens=8, started=0.0, ended=400.0))
    now[0] = 500.0
    assert (meter.silence, meter.rates()) == (100.0, "0.0 samples/s, 0 tokens/s, padding 25%, 06:15 left")
    now[0] = 1000.0
    meter.waiting_for = [1, 3]
    assert meter.rates().endswith(" left, waiting for rank 1, 3, no batch has ended for 10 min 00 s")
