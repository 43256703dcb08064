"""Machines of one run: what node 0 hands to whom, and how what goes wrong is told."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from followers import Followers, MakeConfig, led

import trainer.nodes.cluster as cluster_module
import trainer.nodes.machine as machine_module
from trainer.errors import UserError
from trainer.evaluation.progress import Meter
from trainer.evaluation.spec import EvaluationSpec
from trainer.launching import LaunchConfig, Meeting, TrainingFailedError
from trainer.nodes import Cluster
from trainer.nodes.mailbox import Mailbox

LOOPBACK = socket.if_indextoname(1)  # the first network interface that a system has


def at_most(seconds: float) -> Callable[[], None]:
    """What a training's leader calls while it waits: fails instead of waiting for longer."""
    end = time.monotonic() + seconds

    def poll() -> None:
        assert time.monotonic() < end

    return poll


def evaluation_of(output: Path) -> EvaluationSpec:
    return EvaluationSpec(
        output.parent / "model", sets=(), output_dir=output, batch_size=3, precision="fp32", devices=("cpu",),
        threads=1, by_task=True,
    )  # fmt: skip


class TestWork:
    """What reaches ``run_training`` and ``evaluate`` on which machine; machines are threads here."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], Any]:
        """Name of the training, and rank of its machine in it: place, log and meeting."""
        found: dict[tuple[str, int], Any] = {}

        def train(
            spec: Path, launch: LaunchConfig, device: str, place: int, log: Path, poll: Any, meeting: Meeting | None
        ) -> None:
            rank = meeting.rank if meeting else 0
            if (spec.parent.name, rank) == ("slot-1", 1):
                time.sleep(1.5)  # the last one to end, by more than node 0's looks are apart
            found[spec.parent.name, rank] = (place, log.name, meeting, launch.threads)
            if spec.parent.name == f"fails-on-{rank}":
                raise TrainingFailedError("out of memory")
            if spec.parent.name.startswith("fails-on") or spec.parent.name == "endless":
                ticks = threading.Event()
                try:
                    while True:  # as a training whose other machine is gone
                        poll()
                        ticks.wait(0.1)
                finally:
                    time.sleep(0.3)  # a process takes a while to end
                    found[spec.parent.name, rank] = "over"

        monkeypatch.setattr(machine_module, "run_training", train)
        return found

    def spec(self, folder: Path, name: str) -> Path:
        return folder / "trainings" / name / "spec.json"

    def test_a_training_goes_to_the_machines_of_its_slot(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path, calls: dict[tuple[str, int], Any]
    ) -> None:
        four = make_config(nodes=4, nodes_per_training=2, parallel=2)
        followers.start(four, 1, 2, 3)
        with led(four, followers, tmp_path / "run") as cluster:
            for slot in range(four.launch.slots):
                spec = self.spec(tmp_path, f"slot-{slot}")
                cluster.train(spec, slot, spec.parent / "output.log", lambda: None)
                assert {(f"slot-{slot}", 0), (f"slot-{slot}", 1)} <= calls.keys()
        assert not any((tmp_path / "run").iterdir())  # nothing of the machines is left
        assert {(name, rank): (place, log) for (name, rank), (place, log, *_) in calls.items()} == {
            (f"slot-{slot}", rank): (slot // 2, "output.node1.log" if rank else "output.log")
            for slot in range(4)
            for rank in range(2)
        }
        for slot in range(4):
            here, there = (calls[f"slot-{slot}", rank][2] for rank in range(2))
            assert (here.rank, there.rank) == (0, 1)
            assert (here.nodes, here.host, here.port) == (there.nodes, there.host, there.port)
            assert (here.nodes, here.host) == (2, "127.0.0.1")
            assert (here.interface, there.interface) == (LOOPBACK, LOOPBACK)

    def test_every_machine_meets_node_0_where_it_has_found_it(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path, calls: dict[tuple[str, int], Any]
    ) -> None:
        two = make_config(nodes=2, nodes_per_training=2)
        followers.start(two, 1)
        own = replace(followers.node(0, two), host="localhost")
        (tmp_path / "run").mkdir()
        spec = self.spec(tmp_path, "ew")
        with Cluster(two, "cpu", own, tmp_path / "run", lambda text: None) as cluster:
            launch = two.launch.model_copy(update={"threads": 7})
            cluster.train(spec, 0, spec.parent / "output.log", lambda: None, launch)
        assert [calls["ew", rank][2].host for rank in (0, 1)] == ["localhost", "127.0.0.1"]
        assert [calls["ew", rank][3] for rank in (0, 1)] == [7, 7]

    @pytest.mark.parametrize("rank", [0, 1])
    @pytest.mark.parametrize("slot", [0, 1])
    def test_a_failure_on_any_machine_ends_the_training_on_all(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path,
        calls: dict[tuple[str, int], Any], slot: int, rank: int,
    ) -> None:  # fmt: skip
        """Slot 0 is on machines 0 and 1, slot 1 on machines 2 and 3. The next training finds them free."""
        four = make_config(nodes=4, nodes_per_training=2)
        followers.start(four, 1, 2, 3)
        with led(four, followers, tmp_path / "run") as cluster:
            spec = self.spec(tmp_path, f"fails-on-{rank}")
            machine = "" if 2 * slot + rank == 0 else rf"node {2 * slot + rank} \(.*\): "
            with pytest.raises(TrainingFailedError, match=rf"^{machine}out of memory$"):
                cluster.train(spec, slot, spec.parent / "output.log", lambda: None)
            assert calls[f"fails-on-{rank}", 1 - rank] == "over"
            spec = self.spec(tmp_path, "next")
            cluster.train(spec, slot, spec.parent / "output.log", lambda: None)
        assert {name for name, _ in calls} == {f"fails-on-{rank}", "next"}

    @pytest.mark.parametrize("kind", ["training", "evaluation"])
    def test_called_off(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path,
        calls: dict[tuple[str, int], Any], monkeypatch: pytest.MonkeyPatch, kind: str,
    ) -> None:  # fmt: skip
        """What node 0 raises ends the work there; its own interruption is what the other one tells."""
        two = make_config(nodes=2)
        followers.start(two, 1)
        spec = self.spec(tmp_path, "endless")

        def poll(*_: object) -> None:
            if calls:
                raise KeyboardInterrupt

        def evaluate(given: EvaluationSpec, processes: Any, report: Any) -> None:
            machine_module.run_training(spec, two.launch, "cpu", 0, tmp_path, lambda: report(Meter(0, 5)), None)

        monkeypatch.setattr(machine_module, "evaluate", evaluate)
        work: dict[str, Callable[[Cluster], None]] = {
            "training": lambda cluster: cluster.train(spec, 1, spec.parent / "output.log", poll),
            "evaluation": lambda cluster: cluster.evaluate(evaluation_of(tmp_path / "ew" / "test"), 1, poll),
        }
        with pytest.raises(KeyboardInterrupt), led(two, followers, tmp_path / "run") as cluster:
            work[kind](cluster)
        assert calls == {("endless", 0): "over"}
        followers.join()
        assert str(followers.errors[1]) == "node 0 has ended the run: interrupted"

    def test_what_another_machine_has_written_is_looked_for_again(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path,
        calls: dict[tuple[str, int], Any], monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """A network file system may remember on node 0 that there was no model, or no folder of an evaluation."""
        opened, scandir = [], os.scandir

        def noted(path: Any) -> Any:
            opened.append((Path(path), len(calls)))
            return scandir(path)

        monkeypatch.setattr(cluster_module.os, "scandir", noted)
        monkeypatch.setattr(machine_module, "evaluate", lambda *_: calls.setdefault(("ew/test", 0), ()))
        two = make_config(nodes=2)
        followers.start(two, 1)
        spec = self.spec(tmp_path, "ew")
        evaluation = evaluation_of(tmp_path / "evaluations" / "ew" / "test")
        with led(two, followers, tmp_path / "run") as cluster:
            cluster.train(spec, 1, spec.parent / "output.log", lambda: None)
            assert (spec.parent, 1) in opened
            cluster.evaluate(evaluation, 1, lambda done, total, note: None)
        outer = [tmp_path, tmp_path / "evaluations", tmp_path / "evaluations" / "ew"]
        assert [path for path, done in opened if done == 2][:4] == [*outer, evaluation.output_dir]

    def test_an_error_that_names_what_is_no_text(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file name of other bytes than UTF-8, or half an emoji in a record."""

        def train(*_: Any) -> None:
            raise TrainingFailedError("photo-\udce9.png is broken")

        monkeypatch.setattr(machine_module, "run_training", train)
        two = make_config(nodes=2)
        followers.start(two, 1)
        spec = self.spec(tmp_path, "ew")
        with (
            pytest.raises(TrainingFailedError, match=r"photo-\?\.png is broken"),
            led(two, followers, tmp_path / "run") as cluster,
        ):
            cluster.train(spec, 1, spec.parent / "output.log", at_most(20))

    def test_a_machine_that_is_interrupted_at_work(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path,
        calls: dict[tuple[str, int], Any], monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Node 0 says so in a line."""
        two = make_config(nodes=2)
        spec = self.spec(tmp_path, "endless")
        beat = Mailbox.beat

        def interrupted(mailbox: Mailbox, rank: int) -> None:
            if calls:
                raise UserError("interrupted")
            beat(mailbox, rank)

        monkeypatch.setattr(Mailbox, "beat", interrupted)
        followers.start(two, 1)
        with (
            pytest.raises(TrainingFailedError, match=r"^node 1 \(.*\): this machine was interrupted"),
            led(two, followers, tmp_path / "run") as cluster,
        ):
            cluster.train(spec, 1, spec.parent / "output.log", lambda: None)

    def test_a_machine_that_is_not_heard_of(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path,
        calls: dict[tuple[str, int], Any], monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """As one that is switched off; nobody waits for its goodbye."""
        monkeypatch.setattr(cluster_module, "SILENCE", 1.0)
        monkeypatch.setattr(Mailbox, "beat", lambda *_: None)
        two = make_config(nodes=2)
        spec = self.spec(tmp_path, "endless")
        followers.start(two, 1)
        with (
            pytest.raises(TrainingFailedError, match=r"^node 1 \(.*\) has not been heard of for 1 s; start it again"),
            led(two, followers, tmp_path / "run") as cluster,
        ):
            cluster.train(spec, 1, spec.parent / "output.log", at_most(30))

    def test_a_defect_on_node_0_is_told_with_its_kind(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path
    ) -> None:
        """Node 0 may be ended before it can show a traceback, as soon as the first of the others has left."""
        two = make_config(nodes=2)
        followers.start(two, 1)
        with pytest.raises(KeyError), led(two, followers, tmp_path / "run"):
            raise KeyError("boxes")
        followers.join()
        assert str(followers.errors[1]) == "node 0 has ended the run: KeyError: 'boxes'"

    def test_an_evaluation_goes_to_the_first_machine_of_its_slot(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With its progress back, and its errors. Slot 3 is the second place of machines 2 and 3."""
        four = make_config(nodes=4, nodes_per_training=2, parallel=2)
        spec = evaluation_of(tmp_path / "ew" / "test")
        seen, shown = [], threading.Event()
        whole = machine_module.Machine.evaluate

        def noted(machine: machine_module.Machine, given: EvaluationSpec, place: int, report: Any) -> None:
            seen.append((given, machine.rank, place))
            whole(machine, given, place, report)

        class Fast(Meter):
            def rates(self) -> str:
                return "fast"

        def evaluate(given: EvaluationSpec, processes: Any, report: Any) -> None:
            while not shown.is_set():
                report(Fast(5, 7))
                shown.wait(0.1)
            if len(seen) == 2:
                raise UserError("image a.png cannot be read")

        monkeypatch.setattr(machine_module, "evaluate", evaluate)
        monkeypatch.setattr(machine_module.Machine, "evaluate", noted)

        def report(done: int, total: int, note: str) -> None:
            if total:
                assert (done, total, note) == (5, 7, "fast")
                shown.set()

        followers.start(four, 1, 2, 3)
        with led(four, followers, tmp_path / "run") as cluster:
            cluster.evaluate(spec, 3, report)
            assert shown.is_set()
            with pytest.raises(UserError, match=r"^node 2 \(.*\): image a\.png cannot be read$"):
                cluster.evaluate(spec, 3, report)
        assert seen == [(spec, 2, 1)] * 2

    @pytest.mark.parametrize(("device", "closed"), [("cpu", []), ("cuda", [1])])
    def test_ranks_give_their_gpu_memory_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, closed: list[int]
    ) -> None:
        """To the trainings that come next in this place; on a CPU they stay, and need not start again."""
        found: list[int] = []
        monkeypatch.setattr(machine_module, "evaluate", lambda *_: None)
        machine = machine_module.Machine(LaunchConfig(parallel=2), device)
        for place, group in enumerate(machine._groups):
            monkeypatch.setattr(group, "close", lambda place=place: found.append(place))
        spec = replace(evaluation_of(tmp_path), devices=(device,))
        machine.evaluate(spec, 1, lambda done, total, note: None)
        assert found == closed
        machine.close()
        assert found == [*closed, 0, 1]

    @pytest.mark.parametrize("output", ["/output", "/mnt/output"])
    def test_an_output_folder_near_the_root(
        self,
        make_config: MakeConfig,
        followers: Followers,
        tmp_path: Path,
        calls: dict[tuple[str, int], Any],
        output: str,
    ) -> None:
        """`cotbal train` has its specification right in its output folder, as mounted into a container."""
        two = make_config(nodes=2, nodes_per_training=2)
        followers.start(two, 1)
        with led(two, followers, tmp_path / "run") as cluster:
            cluster.train(Path(output) / "spec.json", 0, Path(output) / "output.log", lambda: None)
        assert calls.keys() == {("output", 0), ("output", 1)}
