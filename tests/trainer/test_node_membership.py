"""Which of a run's machines this one is, where node 0 is, and how trainings are spread over them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import parse_config
from trainer.errors import UserError
from trainer.launching import LaunchConfig
from trainer.nodes import Membership, find_membership
from trainer.nodes.membership import first_host

FROM_OUTSIDE = ("PET_NODE_RANK", "NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT", "MASTER_ADDR", "MASTER_PORT")
SLURM = {
    "SLURM_NODEID": "2", "SLURM_STEP_NUM_NODES": "4", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[07-09,12]",
}  # fmt: skip
# The variables of a job's script, which one of its machines runs alone.
OF_A_SCRIPT = {"SLURM_NODEID": "0", "SLURM_NNODES": "4", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[07-09,12]"}
FOUR = LaunchConfig(nodes=4)


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*FROM_OUTSIDE, *SLURM, "SLURM_NNODES", "SLURM_JOB_ID", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)


class TestMembership:
    @pytest.mark.parametrize(
        ("environment", "options", "expected"),
        [
            ({}, (1, "node-a"), Membership(1, 4, "node-a", 29400)),
            ({}, (0, "10.0.0.7:1234"), Membership(0, 4, "10.0.0.7", 1234)),
            ({}, (0, "[fd00::1]:1"), Membership(0, 4, "fd00::1", 1)),
            ({}, (0, "a:65535"), Membership(0, 4, "a", 65535)),
            (SLURM | {"SLURM_JOB_NODELIST": "gpu07"}, (None, None), Membership(2, 4, "gpu07", 29400)),
            (SLURM, (None, None), Membership(2, 4, "gpu07", 29400)),
            # Jobs that share machines must not share a port.
            (SLURM | {"SLURM_JOB_ID": "170042"}, (None, None), Membership(2, 4, "gpu07", 20042)),
            (SLURM | {"SLURM_JOB_ID": "9999"}, (None, "gpu07"), Membership(2, 4, "gpu07", 29400)),
            (SLURM, (None, "gpu07-ib:5000"), Membership(2, 4, "gpu07-ib", 5000)),
            # A step on some of a job's machines has a list and numbers of its own.
            (
                SLURM | {"SLURM_NNODES": "9", "SLURM_STEP_NODELIST": "gpu[08-11]"},
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
            ({}, (1, "a:0"), "port of node 0 must be 1 to 65535, got 0"),
            ({"MASTER_ADDR": "a", "MASTER_PORT": "65536"}, (1, None), "must be 1 to 65535, got 65536"),
            ({"NODE_RANK": "one", "MASTER_ADDR": "a"}, (None, None), "NODE_RANK must be a number, got 'one'"),
            (SLURM | {"SLURM_STEP_NUM_NODES": "3"}, (None, None), "SLURM has started this on 3 machine"),
            (OF_A_SCRIPT, (None, None), "nothing says which of them this one is.*, or with srun --ntasks-per-node=1"),
            ({"SLURM_STEP_NUM_NODES": "4"}, (None, "a"), "nothing says which of them this one is"),
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
        for name, value in OF_A_SCRIPT.items():
            monkeypatch.setenv(name, value)
        assert find_membership(LaunchConfig()) == Membership()
        monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")  # of a job of four
        assert find_membership(LaunchConfig()) == Membership()
        monkeypatch.setenv("SLURM_STEP_NUM_NODES", "4")
        with pytest.raises(UserError, match=r"on 4 machines and launch\.nodes is 1: .* set launch\.nodes to 4"):
            find_membership(LaunchConfig())
        for options in ((0, None), (None, "node-a")):
            with pytest.raises(UserError, match=r"say how many with launch\.nodes"):
                find_membership(LaunchConfig(), *options)

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
