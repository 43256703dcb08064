"""Which of a run's machines this one is, and where node 0 is: said by the user, by SLURM or by the environment."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from trainer.errors import UserError
from trainer.launching import LaunchConfig

PORT = 29400  # of node 0, where none is given
_OF_JOBS = (20_000, 10_000)  # under SLURM: the first port, and how many; below those that systems give out themselves
# What launchers of one process per machine set: torchrun's own names (Kubeflow), then the common ones.
_RANKS = ("PET_NODE_RANK", "NODE_RANK")
_ADDRESSES = (("PET_MASTER_ADDR", "PET_MASTER_PORT"), ("MASTER_ADDR", "MASTER_PORT"))


@dataclass(frozen=True)
class Membership:
    """This machine among those of a run.

    Attributes:
        rank: 0 leads.
        count: of machines.
        host, port: where node 0 listens; not used when there is one machine.
    """

    rank: int = 0
    count: int = 1
    host: str = ""
    port: int = PORT

    @property
    def address(self) -> str:
        """As ``--master`` takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def find_membership(launch: LaunchConfig, rank: int | None = None, master: str | None = None) -> Membership:
    """This machine's place among ``launch.nodes``.

    Args:
        launch: of the configuration.
        rank: ``--node-rank``; None asks the environment.
        master: ``--master``, ``HOST`` or ``HOST:PORT``; None asks the environment.

    Raises:
        UserError: nothing says it, or what is said does not fit ``launch.nodes``.
    """
    if launch.nodes == 1:
        if rank is not None or master is not None:
            raise UserError("--node-rank and --master are for several machines; say how many with launch.nodes")
        started = os.environ.get("SLURM_STEP_NUM_NODES", "1")
        if started != "1":  # a lock would not keep them apart on every shared file system
            raise UserError(
                f"SLURM has started this on {started} machines and launch.nodes is 1: each would do the whole run, in "
                f"the same folder; set launch.nodes to {started}, or start it on one with srun --nodes=1"
            )
        return Membership()
    if rank is None:
        rank = _rank(launch.nodes)
    if not 0 <= rank < launch.nodes:
        raise UserError(f"node rank {rank} must be 0 to {launch.nodes - 1}, because launch.nodes is {launch.nodes}")
    host, port = _address(master)
    if not 0 < port < 65536:
        raise UserError(f"the port of node 0 must be 1 to 65535, got {port}")
    return Membership(rank, launch.nodes, host, port)


def _rank(nodes: int) -> int:
    for name in _RANKS:
        if name in os.environ:
            return _number(name)
    started = os.environ.get("SLURM_STEP_NUM_NODES")
    if started is None or "SLURM_NODEID" not in os.environ:  # a job's script has a number, of its machine alone
        raise _unknown("which of them this one is", "--node-rank R, 0 to N - 1")
    if started != str(nodes):
        raise UserError(f"launch.nodes is {nodes} and SLURM has started this on {started} machine(s); make them equal")
    if os.environ.get("SLURM_LOCALID", "0") != "0":
        raise UserError("SLURM has started more than one task on this machine; use srun --ntasks-per-node=1")
    return _number("SLURM_NODEID")


def _address(master: str | None) -> tuple[str, int]:
    if master is None:
        for name, port in _ADDRESSES:
            if name in os.environ:
                return os.environ[name], _number(port) if port in os.environ else PORT
        listed = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST"))
        if listed is None:
            raise _unknown("where node 0 is", "--master HOST:PORT")
        return first_host(listed), _port_of_job()
    # HOST, HOST:PORT, and an IPv6 address in brackets with either
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[^:\[\]\s]+)(?::(\d+))?", master)
    if found is None:
        raise UserError(f"--master must be HOST or HOST:PORT, got '{master}'")
    return found[1].strip("[]"), int(found[2] or PORT)


def first_host(listed: str) -> str:
    """The first name of SLURM's short form of a list of hosts: ``gpu[03-05,9],login1`` starts with ``gpu03``."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", listed, maxsplit=1)[0])


def _port_of_job() -> int:
    """The same on every machine of a job, and another one for another job, which may share machines with it."""
    first, count = _OF_JOBS
    return first + _number("SLURM_JOB_ID") % count if "SLURM_JOB_ID" in os.environ else PORT


def _number(name: str) -> int:
    value = os.environ[name]
    if not value.isdecimal():
        raise UserError(f"the environment variable {name} must be a number, got '{value}'")
    return int(value)


def _unknown(what: str, remedy: str) -> UserError:
    return UserError(
        f"launch.nodes asks for several machines and nothing says {what}: start the same command on each of them with "
        f"{remedy}, or with srun --ntasks-per-node=1, which says it by itself"
    )
