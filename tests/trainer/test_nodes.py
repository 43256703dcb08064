"""Machines of one run: who is who, what is refused before anything is trained, and what node 0 hands to whom."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import free_port

import trainer.nodes.cluster as cluster_module
import trainer.nodes.following as following
import trainer.nodes.machine as machine_module
from trainer.config import LaunchConfig, RunConfig, parse_config
from trainer.errors import UserError
from trainer.evaluation import EvaluationSpec
from trainer.launching import Meeting, TrainingFailedError
from trainer.nodes import Cluster, Membership, find_membership, follow
from trainer.nodes.mailbox import Mailbox
from trainer.nodes.membership import first_host

FROM_OUTSIDE = ("PET_NODE_RANK", "NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT", "MASTER_ADDR", "MASTER_PORT")
SLURM = {"SLURM_NODEID": "2", "SLURM_NNODES": "4", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[07-09,12]"}
FOUR = LaunchConfig(nodes=4)


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*FROM_OUTSIDE, *SLURM, "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)


class TestMembership:
    @pytest.mark.parametrize(
        ("environment", "options", "expected"),
        [
            ({}, (1, "node-a"), Membership(1, 4, "node-a", 29400)),
            ({}, (0, "10.0.0.7:1234"), Membership(0, 4, "10.0.0.7", 1234)),
            ({}, (0, "[fd00::1]:80"), Membership(0, 4, "fd00::1", 80)),
            (SLURM, (None, None), Membership(2, 4, "gpu07", 29400)),
            (SLURM, (None, "gpu07-ib:5000"), Membership(2, 4, "gpu07-ib", 5000)),
            # A step on some of a job's machines has a list and numbers of its own.
            (
                SLURM | {"SLURM_NNODES": "9", "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NODELIST": "gpu[08-11]"},
                (None, None),
                Membership(2, 4, "gpu08", 29400),
            ),
            (
                {"NODE_RANK": "3", "MASTER_ADDR": "head", "MASTER_PORT": "777"},
                (None, None),
                Membership(3, 4, "head", 777),
            ),
            ({"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "head"} | SLURM, (None, None), Membership(1, 4, "head", 29400)),
            ({"NODE_RANK": "1", "MASTER_ADDR": "head"}, (2, "other"), Membership(2, 4, "other", 29400)),
        ],
    )
    def test_who_this_machine_is(
        self,
        monkeypatch: pytest.MonkeyPatch,
        environment: dict[str, str],
        options: tuple[Any, Any],
        expected: Membership,
    ) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert find_membership(FOUR, *options) == expected
        assert find_membership(FOUR, expected.rank, expected.address) == expected

    @pytest.mark.parametrize(
        ("environment", "options", "message"),
        [
            ({}, (None, "a"), "which of them this one is"),
            ({}, (1, None), "where node 0 is"),
            ({}, (4, "a"), "node rank 4 must be 0 to 3"),
            ({}, (1, "a:b"), "--master must be HOST or HOST:PORT, got 'a:b'"),
            ({}, (1, "a:70000"), "--master must be"),
            ({"NODE_RANK": "one", "MASTER_ADDR": "a"}, (None, None), "NODE_RANK must be a number, got 'one'"),
            (SLURM | {"SLURM_NNODES": "3"}, (None, None), "SLURM has started this on 3 machine"),
            (SLURM | {"SLURM_LOCALID": "1"}, (None, None), "--ntasks-per-node=1"),
        ],
    )
    def test_what_cannot_be(
        self, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], options: tuple[Any, Any], message: str
    ) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=message):
            find_membership(FOUR, *options)

    def test_one_machine_asks_nobody(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in SLURM.items():
            monkeypatch.setenv(name, value)
        assert find_membership(LaunchConfig()) == Membership()
        with pytest.raises(UserError, match=r"say how many with launch\.nodes"):
            find_membership(LaunchConfig(), 0, None)

    @pytest.mark.parametrize(
        ("listed", "first"),
        [
            ("gpu1", "gpu1"), ("gpu1,gpu2", "gpu1"), ("gpu[03-05]", "gpu03"), ("gpu[9,11-12],login", "gpu9"),
            ("a-b[1-2]-ib,c", "a-b1-ib"), ("r[1-2]n[3-4]", "r1n3"), ("host-1.cluster.org", "host-1.cluster.org"),
        ],
    )  # fmt: skip
    def test_the_first_host_of_a_list(self, listed: str, first: str) -> None:
        assert first_host(listed) == first


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_slots_are_spread_over_machines_first_and_share_nothing(groups: int, span: int, parallel: int) -> None:
    """The machines and places of all slots are each pair once, and the first slots are on different machines."""
    launch = LaunchConfig(nodes=groups * span, nodes_per_training=span, parallel=parallel)
    used = [(slot % launch.groups, slot // launch.groups) for slot in range(launch.slots)]
    assert sorted(used) == [(group, place) for group in range(groups) for place in range(parallel)]
    assert [group for group, _ in used[:groups]] == list(range(groups))


def test_machines_that_would_be_left_over(run_data: dict[str, Any]) -> None:
    run_data["launch"] |= {"nodes": 3, "nodes_per_training": 2}
    with pytest.raises(UserError, match=r"nodes_per_training: must divide launch\.nodes.* is 3"):
        parse_config(run_data, "test")


class Followers:
    """Machines of a run in threads of this process."""

    def __init__(self) -> None:
        self.port = free_port()
        self.threads: list[threading.Thread] = []
        self.errors: dict[int, Exception] = {}

    def node(self, rank: int, config: RunConfig) -> Membership:
        return Membership(rank, config.launch.nodes, "127.0.0.1", self.port)

    def start(self, config: RunConfig, *ranks: int) -> None:
        for rank in ranks:
            self.threads.append(threading.Thread(target=self._follow, args=(config, rank), daemon=True))
            self.threads[-1].start()

    def _follow(self, config: RunConfig, rank: int) -> None:
        try:
            follow(config, self.node(rank, config))
        except Exception as error:
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
        followers.start(own, 1)
        followers.start(other, 2)
        with pytest.raises(UserError) as told, led(own, followers, tmp_path / "run"):
            pytest.fail("the run has begun")
        lines = str(told.value).splitlines()
        assert [line.split(" (")[0] for line in lines] == ["node 1", "node 2", "node 2", "node 2"]
        assert f"torch is 1.0 there and {versions['torch']} here" in lines[0]
        assert f"{tmp_path / 'none.jsonl'} does not exist there" in lines[1]
        assert "torch is 1.0" in lines[2]
        assert "the configuration differs in seed, tasks;" in lines[3]
        followers.join()
        for rank in (1, 2):
            assert str(followers.errors[rank]) == f"node 0 has ended the run: {told.value}"

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
            raise RuntimeError("interrupted")

        monkeypatch.setattr(following, "_work", work)
        followers.start(config(nodes=3), 1)
        with (
            pytest.raises(TrainingFailedError, match=r"^node 1 \(.*\) has left: RuntimeError: interrupted"),
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
            found[spec.parent.name, rank] = (place, log.name, meeting)
            if spec.parent.name == f"fails-on-{rank}":
                raise TrainingFailedError("out of memory")
            if spec.parent.name.startswith("fails-on") or spec.parent.name == "endless":
                ticks = threading.Event()
                while True:  # as a training whose other machine is gone
                    poll()
                    ticks.wait(0.1)

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
        assert {(name, rank): (place, log) for (name, rank), (place, log, _) in calls.items()} == {
            (f"slot-{slot}", rank): (slot // 2, "output.node1.log" if rank else "output.log")
            for slot in range(4)
            for rank in range(2)
        }
        for slot in range(4):
            here, there = (calls[f"slot-{slot}", rank][2] for rank in range(2))
            assert (here.rank, there.rank) == (0, 1)
            assert (here.nodes, here.host, here.port) == (there.nodes, there.host, there.port)
            assert (here.nodes, here.host) == (2, "127.0.0.1")

    def test_every_machine_meets_node_0_where_it_has_found_it(
        self, config: Callable[..., RunConfig], followers: Followers, tmp_path: Path, calls: dict[tuple[str, int], Any]
    ) -> None:
        two = config(nodes=2, nodes_per_training=2)
        followers.start(two, 1)
        own = replace(followers.node(0, two), host="localhost")
        (tmp_path / "run").mkdir()
        spec = self.spec(tmp_path, "ew")
        with Cluster(two, "cpu", own, tmp_path / "run", lambda text: None) as cluster:
            cluster.train(spec, 0, spec.parent / "output.log", lambda: None)
        assert [calls["ew", rank][2].host for rank in (0, 1)] == ["localhost", "127.0.0.1"]

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
        assert str(followers.errors[1]) == "node 0 has ended the run: KeyboardInterrupt"

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
        deadline = time.monotonic() + 20

        def poll() -> None:
            assert time.monotonic() < deadline

        with (
            pytest.raises(TrainingFailedError, match=r"photo-\?\.png is broken"),
            led(two, followers, tmp_path / "run") as cluster,
        ):
            cluster.train(spec, 1, spec.parent / "output.log", poll)

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
