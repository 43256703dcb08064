"""What one machine does for a run: trainings and evaluations in its places."""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import psutil

from trainer.config import RunConfig
from trainer.evaluation.ranks import RankProcesses
from trainer.evaluation.running import evaluate
from trainer.evaluation.spec import EvaluationSpec
from trainer.launching import LaunchConfig, Meeting, run_training
from trainer.nodes.mailbox import POLL, Mailbox
from trainer.nodes.membership import PORT
from trainer.nodes.messages import Port, TrainingJob
from trainer.tasks import SPLITS

Report = Callable[[int, int, str], None]  # records done, records in all, a note on the speed


class Machine:
    """The processes of this machine: a group of ``launch.processes`` for each of its ``launch.parallel`` places."""

    def __init__(self, launch: LaunchConfig, device: str, rank: int = 0) -> None:
        self.device = device
        self.rank = rank
        self._groups = [RankProcesses(launch.processes) for _ in range(launch.parallel)]

    def train(self, job: TrainingJob, poll: Callable[[], None], mailbox: Mailbox | None = None) -> None:
        """This machine's part of a training, to its end.

        Raises:
            TrainingFailedError: a training process ended with an error.
        """
        meeting, log = None, job.log
        if len(job.nodes) > 1:
            assert mailbox is not None
            meeting = _meet(job, self.rank, mailbox, poll)
            log = log_of(job.log, meeting.rank)
        run_training(job.spec, job.launch, self.device, job.place, log, poll, meeting)

    def evaluate(self, spec: EvaluationSpec, place: int, report: Report) -> None:
        """Evaluates in the ranks of a place, and gives their GPU memory back to the trainings."""
        group = self._groups[place]
        try:
            evaluate(spec, group, lambda meter: report(meter.done, meter.total, meter.rates()))
        finally:
            if self.device != "cpu":
                group.close()

    def close(self) -> None:
        for group in self._groups:
            group.close()


def log_of(log: Path, rank: int) -> Path:
    """The output of a training on its `rank`-th machine."""
    return log if rank == 0 else log.with_name(f"{log.stem}.node{rank}{log.suffix}")


def versions() -> dict[str, str]:
    """What must be the same on every machine."""
    packages = {name: version(name) for name in ("cotbal", "torch", "transformers", "deepspeed", "accelerate")}
    return {"python": platform.python_version(), **packages}


def record_sizes(config: RunConfig) -> dict[str, int | None]:
    """Bytes of the record files as this machine sees them, by path; None of one that it does not see."""
    tasks = [] if isinstance(config.tasks, str) else config.tasks
    files = [path for task in tasks for split in SPLITS for path in task.record_files(split).values()]
    return {str(path): path.stat().st_size if path.is_file() else None for path in files}


def _meet(job: TrainingJob, node: int, mailbox: Mailbox, poll: Callable[[], None]) -> Meeting:
    """The first machine of the training finds a free port; the others wait to hear of it."""
    key, rank = f"port/{job.number}", job.nodes.index(node)
    if rank == 0:
        mailbox.post(key, Port(port=_free_port()))
    while (found := mailbox.read(key, Port)) is None:
        poll()
        time.sleep(POLL)
    # What node 0 calls itself may be another machine's loopback there: "localhost", or a name of its own hosts file.
    host = mailbox.host if job.nodes[0] == 0 else job.addresses[0]
    return Meeting(rank, len(job.nodes), host, found.port, interface_towards(host if rank else job.addresses[1]))


def interface_towards(host: str) -> str | None:
    """The network interface of this machine on the way to another one; None if there is no way."""
    own: set[str] = set()
    with suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, PORT, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(address)  # sends nothing
                own.add(probe.getsockname()[0])
                break
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if any(one.address in own for one in found)), None)


def _free_port() -> int:
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
