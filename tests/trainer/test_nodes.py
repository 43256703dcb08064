"""Machines of one run: what is refused before anything is trained, and what node 0 hands to whom."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from machines import free_port

import trainer.nodes.cluster as cluster_module
import trainer.nodes.following as following
import trainer.nodes.machine as machine_module
from trainer.config import RunConfig, parse_config
from trainer.errors import UserError
from trainer.evaluation.spec import EvaluationSpec
from trainer.launching import TERMINATED, LaunchConfig, Meeting, TrainingFailedError
from trainer.nodes import Cluster, Membership, follow
from trainer.nodes.mailbox import Mailbox

LOOPBACK = socket.if_indextoname(1)  # the first network interface that a system has


class Followers:
    """Machines of a run in threads of this process."""

    def __init__(self) -> None:
        self.port = free_port()
        self.threads: list[threading.Thread] = []
        self.errors: dict[int, BaseException] = {}

    def node(self, rank: int, config: RunConfig) -> Membership:
        return Membership(rank, config.launch.nodes, "127.0.0.1", self.port)

    def start(self, config: RunConfig, *ranks: int) -> None:
        for rank in ranks:
            self.threads.append(threading.Thread(target=self._follow, args=(config, rank), daemon=True))
            self.threads[-1].start()

    def _follow(self, config: RunConfig, rank: int) -> None:
        try:
            follow(config, self.node(rank, config))
        except BaseException as error:
            self.errors[rank] = error

    def join(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture
def followers() -> Iterator[Followers]:
    found = Followers()
    yield found
    found.join()


@pytest.fixture
def config(run_data: dict[str, Any]) -> Callable[..., RunConfig]:
    def make(**launch: Any) -> RunConfig:
        return parse_config(run_data | {"launch": run_data["launch"] | launch}, "test")

    return make


def led(config: RunConfig, followers: Followers, folder: Path) -> Cluster:
    folder.mkdir(exist_ok=True)
    return Cluster(config, "cpu", followers.node(0, config), folder, lambda text: None)


def at_most(seconds: float) -> Callable[[], None]:
    """What a training's leader calls while it waits: fails instead of waiting for longer."""
    end = time.monotonic() + seconds

    def poll() -> None:
        assert time.monotonic() < end

    return poll


class TestWhoMayTakePart:
    def test_everything_that_differs_is_told_at_once(
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = config(nodes=3)
        other = own.model_copy(update={"seed": 9})
        (moved := other.tasks[0].model_copy(update={"train": tmp_path / "none.jsonl"}))  # type: ignore[union-attr]
        other.tasks = [moved, *other.tasks[1:]]  # type: ignore[list-item]
        versions = machine_module.versions()
        monkeypatch.setattr(following, "versions", lambda: versions | {"torch": "1.0"})
        older = str(own.tasks[1].train)  # type: ignore[union-attr]
        size, sizes = Path(older).stat().st_size, machine_module.record_sizes
        monkeypatch.setattr(following, "record_sizes", lambda given: sizes(given) | {older: size - 9})
        followers.start(own, 1)
        followers.start(other, 2)
        with pytest.raises(UserError) as told, led(own, followers, tmp_path / "run"):
            pytest.fail("the run has begun")
        lines = str(told.value).splitlines()
        assert [line.split(" (")[0] for line in lines] == ["node 1"] * 2 + ["node 2"] * 4
        assert f"torch is 1.0 there and {versions['torch']} here" in lines[0]
        assert f"{older} has {size - 9} bytes there and {size} here; give every machine the same records" in lines[1]
        assert f"{tmp_path / 'none.jsonl'} does not exist there" in lines[2]
        assert "torch is 1.0" in lines[3]
        assert f"{older} has" in lines[4]
        assert "the configuration differs in seed, tasks;" in lines[5]
        followers.join()
        for rank in (1, 2):
            assert str(followers.errors[rank]) == f"node 0 has ended the run: {told.value}"

    @pytest.mark.parametrize(
        ("problem", "told"),
        [
            ("2 processes take a GPU each and torch sees 1 here", "2 processes take a GPU each and torch sees 1 here"),
            (None, r"launch\.device is cuda there and cpu here; say which one is meant"),
        ],
    )
    def test_one_with_other_gpus(
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, problem: str | None, told: str,
    ) -> None:  # fmt: skip
        """Where there are too few, that is all there is to say."""

        def rank_devices(device: str, ranks: int) -> None:
            if problem:
                raise UserError(problem)

        monkeypatch.setattr(following, "resolve_device", lambda device: "cuda")
        monkeypatch.setattr(following, "rank_devices", rank_devices)
        two = config(nodes=2, processes=2)
        followers.start(two, 1)
        with (
            pytest.raises(UserError, match=rf"^node 1 \(.*\): {told}$"),
            led(two, followers, tmp_path / "run"),
        ):
            pytest.fail("the run has begun")

    def test_a_folder_that_is_not_shared(
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(following, "_VISIBLE_AFTER", 0.0)
        read = Path.read_text

        def read_there(path: Path, *options: Any, **named: Any) -> str:
            return "another" if path.name == ".nodes" else read(path, *options, **named)

        monkeypatch.setattr(Path, "read_text", read_there)
        followers.start(config(nodes=2), 1)
        with (
            pytest.raises(UserError, match=r"node 1 .*run is not the folder of node 0; put it on a file system"),
            led(config(nodes=2), followers, tmp_path / "run"),
        ):
            pytest.fail("the run has begun")

    def test_one_that_does_not_come_and_one_that_comes_twice(
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cluster_module, "JOINING", 3.0)
        followers.start(config(nodes=3), 1, 1)
        with (
            pytest.raises(UserError, match="node 2 of 3 did not come within"),
            led(config(nodes=3), followers, tmp_path / "run"),
        ):
            pytest.fail("the run has begun")
        followers.join()
        # The second one has gone at once, the first one with the run; both under the same key of this dictionary.
        assert followers.errors.keys() == {1}

    def test_a_second_machine_of_the_same_rank(
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path
    ) -> None:
        followers.start(config(nodes=2), 1)
        with led(config(nodes=2), followers, tmp_path / "run"), pytest.raises(UserError, match="is node 1 already"):
            follow(config(nodes=2), followers.node(1, config(nodes=2)))
        followers.join()
        assert followers.errors == {}

    def test_one_that_is_killed_while_it_looks_around_may_come_again(
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of the first one nothing is heard until the run is over for the second."""
        look, begun, over = following._other_folder, threading.Event(), threading.Event()

        def killed(mailbox: Mailbox) -> list[str]:
            monkeypatch.setattr(following, "_other_folder", look)
            begun.set()
            over.wait(60)
            return []

        monkeypatch.setattr(cluster_module, "JOINING", 5.0)
        monkeypatch.setattr(following, "_other_folder", killed)
        followers.start(config(nodes=2), 1)
        try:
            cluster = led(config(nodes=2), followers, tmp_path / "run")
            threading.Thread(target=lambda: begun.wait(60) and followers.start(config(nodes=2), 1)).start()
            with cluster:
                over.set()
        finally:
            over.set()
        assert str(followers.errors[1]).startswith("another machine is node 1 already")

    def test_one_that_breaks_down_on_the_way(
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def versions() -> dict[str, str]:
            raise RuntimeError("no metadata of torch")

        monkeypatch.setattr(following, "versions", versions)
        followers.start(config(nodes=2), 1)
        with (
            pytest.raises(UserError, match="node 1 cannot take part: RuntimeError: no metadata of torch"),
            led(config(nodes=2), followers, tmp_path / "run"),
        ):
            pytest.fail("the run has begun")

    def test_one_that_leaves_before_all_have_come(
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def work(*_: Any) -> None:
            raise KeyboardInterrupt(TERMINATED)

        monkeypatch.setattr(following, "_work", work)
        followers.start(config(nodes=3), 1)
        with (
            pytest.raises(TrainingFailedError, match=r"^node 1 \(.*\) has left: ended by SIGTERM; start it again"),
            led(config(nodes=3), followers, tmp_path / "run"),
        ):
            pytest.fail("the run has begun")

    def test_a_port_that_is_taken(self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path) -> None:
        held = Mailbox.open(followers.node(0, config(nodes=2)))
        with (
            pytest.raises(UserError, match=rf"cannot listen at 127\.0\.0\.1:{followers.port}.*free port with --master"),
            led(config(nodes=2), followers, tmp_path / "run"),
        ):
            pytest.fail("the run has begun")
        held.beat(0)

    def test_no_node_0(self, config: Callable[..., RunConfig], followers: Followers) -> None:
        with pytest.raises(UserError, match=rf"node 0 does not answer at 127\.0\.0\.1:{followers.port}"):
            Mailbox.join(followers.node(1, config(nodes=2)), patience=0.0)


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
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path, calls: dict[tuple[str, int], Any]
    ) -> None:
        four = config(nodes=4, nodes_per_training=2, parallel=2)
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
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path, calls: dict[tuple[str, int], Any]
    ) -> None:
        two = config(nodes=2, nodes_per_training=2)
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
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path,
        calls: dict[tuple[str, int], Any], slot: int, rank: int,
    ) -> None:  # fmt: skip
        """Slot 0 is on machines 0 and 1, slot 1 on machines 2 and 3. The next training finds them free."""
        four = config(nodes=4, nodes_per_training=2)
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

    def test_called_off(
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path, calls: dict[tuple[str, int], Any]
    ) -> None:
        """What `poll` raises here ends the training there; node 0's own interruption is what the other one tells."""
        two = config(nodes=2)
        followers.start(two, 1)
        spec = self.spec(tmp_path, "endless")

        def poll() -> None:
            if calls:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), led(two, followers, tmp_path / "run") as cluster:
            cluster.train(spec, 1, spec.parent / "output.log", poll)
        followers.join()
        assert str(followers.errors[1]) == "node 0 has ended the run: interrupted"

    def test_what_another_machine_has_written_is_looked_for_again(
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path,
        calls: dict[tuple[str, int], Any], monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """A network file system may remember on node 0 that there was no model."""
        opened, scandir = [], os.scandir

        def noted(path: Any) -> Any:
            opened.append((Path(path), len(calls)))
            return scandir(path)

        monkeypatch.setattr(cluster_module.os, "scandir", noted)
        two = config(nodes=2)
        followers.start(two, 1)
        spec = self.spec(tmp_path, "ew")
        with led(two, followers, tmp_path / "run") as cluster:
            cluster.train(spec, 1, spec.parent / "output.log", lambda: None)
        assert (spec.parent, 1) in opened

    def test_an_error_that_names_what_is_no_text(
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file name of other bytes than UTF-8, or half an emoji in a record."""

        def train(*_: Any) -> None:
            raise TrainingFailedError("photo-\udce9.png is broken")

        monkeypatch.setattr(machine_module, "run_training", train)
        two = config(nodes=2)
        followers.start(two, 1)
        spec = self.spec(tmp_path, "ew")
        with (
            pytest.raises(TrainingFailedError, match=r"photo-\?\.png is broken"),
            led(two, followers, tmp_path / "run") as cluster,
        ):
            cluster.train(spec, 1, spec.parent / "output.log", at_most(20))

    def test_a_machine_that_is_interrupted_at_work(
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path,
        calls: dict[tuple[str, int], Any], monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Node 0 says so in a line."""
        two = config(nodes=2)
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
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path,
        calls: dict[tuple[str, int], Any], monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """As one that is switched off; nobody waits for its goodbye."""
        monkeypatch.setattr(cluster_module, "SILENCE", 1.0)
        monkeypatch.setattr(Mailbox, "beat", lambda *_: None)
        two = config(nodes=2)
        spec = self.spec(tmp_path, "endless")
        followers.start(two, 1)
        with (
            pytest.raises(TrainingFailedError, match=r"^node 1 \(.*\) has not been heard of for 1 s; start it again"),
            led(two, followers, tmp_path / "run") as cluster,
        ):
            cluster.train(spec, 1, spec.parent / "output.log", at_most(30))

    def test_a_defect_on_node_0_is_told_with_its_kind(
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path
    ) -> None:
        """Node 0 may be ended before it can show a traceback, as soon as the first of the others has left."""
        two = config(nodes=2)
        followers.start(two, 1)
        with pytest.raises(KeyError), led(two, followers, tmp_path / "run"):
            raise KeyError("boxes")
        followers.join()
        assert str(followers.errors[1]) == "node 0 has ended the run: KeyError: 'boxes'"

    def test_an_evaluation_goes_to_the_first_machine_of_its_slot(
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With its progress back, and its errors."""
        two = config(nodes=2)
        spec = EvaluationSpec(
            model_path=tmp_path / "trainings" / "ew" / "model", sets=(), output_dir=tmp_path / "ew" / "test",
            batch_size=3, precision="fp32", devices=("cpu",), threads=1, by_task=True,
        )  # fmt: skip
        seen, shown = [], threading.Event()

        class Meter:
            done, total = 5, 7

            def rates(self) -> str:
                return "fast"

        def evaluate(given: EvaluationSpec, processes: Any, report: Any) -> None:
            seen.append(given)
            while not shown.is_set():
                report(Meter())
                shown.wait(0.1)
            if len(seen) == 2:
                raise UserError("image a.png cannot be read")

        monkeypatch.setattr(machine_module, "evaluate", evaluate)

        def report(done: int, total: int, note: str) -> None:
            if total:
                assert (done, total, note) == (5, 7, "fast")
                shown.set()

        followers.start(two, 1)
        with led(two, followers, tmp_path / "run") as cluster:
            cluster.evaluate(spec, 1, report)
            assert shown.is_set()
            with pytest.raises(UserError, match=r"^node 1 \(.*\): image a\.png cannot be read$"):
                cluster.evaluate(spec, 1, report)
        assert seen == [spec, spec]

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
        spec = EvaluationSpec(
            model_path=tmp_path,
            sets=(),
            output_dir=tmp_path,
            batch_size=1,
            precision="fp32",
            devices=(device,),
            threads=1,
        )
        machine.evaluate(spec, 1, lambda done, total, note: None)
        assert found == closed
        machine.close()
        assert found == [*closed, 0, 1]

    @pytest.mark.parametrize("output", ["/output", "/mnt/output"])
    def test_an_output_folder_near_the_root(
        self,
        config: Callable[..., RunConfig],
        followers: Followers,
        tmp_path: Path,
        calls: dict[tuple[str, int], Any],
        output: str,
    ) -> None:
        """`cotbal train` has its specification right in its output folder, as mounted into a container."""
        two = config(nodes=2, nodes_per_training=2)
        followers.start(two, 1)
        with led(two, followers, tmp_path / "run") as cluster:
            cluster.train(Path(output) / "spec.json", 0, Path(output) / "output.log", lambda: None)
        assert calls.keys() == {("output", 0), ("output", 1)}
