"""Node 0's side: it hands trainings and evaluations to the machines of their slot, and waits for them."""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.evaluation.spec import EvaluationSpec
from trainer.launching import LaunchConfig, TrainingFailedError, rank_devices
from trainer.nodes.machine import Machine, Report, record_sizes, versions
from trainer.nodes.mailbox import JOINING, POLL, Mailbox
from trainer.nodes.membership import Membership
from trainer.nodes.messages import (
    Advance,
    Ended,
    EvaluationJob,
    Hello,
    Job,
    Notice,
    SharedFolder,
    TrainingJob,
    reason_of,
)

SILENCE = 120.0  # seconds after which a machine that says nothing is taken for lost
_GOODBYE = 60.0  # seconds that a machine has to end what it is told to end


class Cluster:
    """The machines of a run, of which this one leads; used in a ``with`` block, which waits for the others to come.

    Slot s of ``launch.slots`` is place ``s // launch.groups`` of the machines of group ``s % launch.groups``: what
    runs at once is spread over the machines first. A training runs on all machines of its group, an evaluation on
    the first of them.

    Args:
        config: of the run.
        device: ``cpu`` or ``cuda``, on every machine.
        node: this machine, rank 0.
        folder: which everything is written into; the same one on every machine.
        say: shows a line.
    """

    def __init__(
        self, config: RunConfig, device: str, node: Membership, folder: Path, say: Callable[[str], None]
    ) -> None:
        self._config, self._launch, self._device = config, config.launch, device
        self._node, self._folder, self._say = node, folder, say
        self._machine = Machine(config.launch, device)
        self._mailbox: Mailbox | None = None
        self._hellos: dict[int, Hello] = {}
        self._seen: dict[int, tuple[int, float]] = {}  # beats of a machine, and when they last grew
        self._jobs = itertools.count()
        self._posted: dict[int, Iterator[int]] = {rank: itertools.count() for rank in range(node.count)}

    def __enter__(self) -> Cluster:
        """Checks this machine's GPUs, and waits for the others.

        Raises:
            UserError: there are too few GPUs, or a machine does not come or cannot take part.
            TrainingFailedError: a machine is gone before all have come.
        """
        rank_devices(self._device, self._launch.processes * self._launch.parallel)
        if self._node.count > 1:
            self._mailbox = Mailbox.open(self._node)
            try:
                self._gather()
            except BaseException as error:
                self._end(error)
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end(error)
        self._machine.close()

    def place(self, slot: int) -> int:
        """Which group of its machines' GPUs a slot has."""
        return slot // self._launch.groups

    def train(
        self, spec: Path, slot: int, log: Path, poll: Callable[[], None], launch: LaunchConfig | None = None
    ) -> None:
        """Runs a training on the machines of its slot, and waits for it.

        Args:
            spec: path of a ``TrainingSpec`` in JSON.
            log: file for its output.
            poll: called about twice a second; an exception that it raises ends the training.
            launch: in place of the configuration's.

        Raises:
            TrainingFailedError: a training process ended with an error, or a machine is lost.
        """
        span = self._launch.nodes_per_training
        first = slot % self._launch.groups * span
        nodes = tuple(range(first, first + span))
        job = TrainingJob(
            number=next(self._jobs),
            spec=spec,
            log=log,
            launch=launch or self._launch,
            place=self.place(slot),
            nodes=nodes,
            addresses=tuple(self._hellos[rank].address if rank else "" for rank in nodes),
        )
        if job.nodes == (0,):
            self._machine.train(job, poll)
            return
        with self._handed_out(job, job.nodes) as others_ended:

            def watch() -> None:
                poll()
                others_ended()

            if first == 0:
                self._machine.train(job, watch, self._mailbox)
            while not others_ended():
                poll()
                time.sleep(POLL)
        _look_again(spec.parent)

    def evaluate(self, spec: EvaluationSpec, slot: int, report: Report) -> None:
        """Runs an evaluation on the first machine of its slot, and waits for it.

        Args:
            report: called about twice a second; an exception that it raises ends the evaluation.

        Raises:
            UserError: as ``trainer.evaluation.evaluate``.
            TrainingFailedError: a machine is lost.
        """
        first = slot % self._launch.groups * self._launch.nodes_per_training
        if first == 0:
            self._machine.evaluate(spec, self.place(slot), report)
            return
        job = EvaluationJob(number=next(self._jobs), spec=spec, place=self.place(slot))
        with self._handed_out(job, (first,)) as ended:
            while not ended():
                assert self._mailbox is not None
                advance = self._mailbox.read(f"progress/{job.number}", Advance) or Advance(done=0, total=0, note="")
                report(advance.done, advance.total, advance.note)
                time.sleep(POLL)
        _look_again(*reversed(spec.output_dir.parents[:3]), spec.output_dir)

    # -- the others ----------------------------------------------------------------------------------------

    def _gather(self) -> None:
        assert self._mailbox is not None
        mark = SharedFolder(path=self._folder / ".nodes", content=secrets.token_hex(8))
        mark.path.write_text(mark.content)
        self._mailbox.post("folder", mark)
        deadline = time.monotonic() + JOINING
        waiting = list(range(1, self._node.count))
        self._say(f"node 0 of {self._node.count}: waiting at {self._node.address} for node {_listed(waiting)}")
        while waiting := [rank for rank in waiting if not self._has_come(rank)]:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"node {_listed(waiting)} of {self._node.count} did not come within {JOINING / 60:.0f} minutes; "
                    f"start the same command there, with --master {self._node.address} and its own --node-rank, or "
                    "all of them with srun --ntasks-per-node=1"
                )
            for rank in self._hellos:  # one that is gone again cannot come back: its rank is taken
                self._check_alive(rank)
            time.sleep(POLL)
        problems = [
            f"{self._name(rank)}: {problem}" for rank in sorted(self._hellos) for problem in self._problems(rank)
        ]
        if problems:
            raise UserError("\n".join(problems))
        self._mailbox.post("start", Notice())
        self._say(f"all {self._node.count} machines are here: {', '.join(map(self._name, range(self._node.count)))}")

    def _has_come(self, rank: int) -> bool:
        assert self._mailbox is not None
        hello = self._mailbox.read(f"hello/{rank}", Hello)
        if hello is not None:
            self._hellos[rank] = hello
        elif (left := self._mailbox.read(f"left/{rank}", Notice)) is not None:
            raise UserError(f"node {rank} cannot take part: {left.reason}")
        return hello is not None

    def _problems(self, rank: int) -> list[str]:
        """Why a machine cannot take part: what it says itself, and what differs from this one."""
        hello, problems = self._hellos[rank], list(self._hellos[rank].problems)
        if hello.device != self._device and not problems:
            problems.append(f"launch.device is {hello.device} there and {self._device} here; say which one is meant")
        for name, own in versions().items():
            if hello.versions.get(name) != own:
                problems.append(
                    f"{name} is {hello.versions.get(name)} there and {own} here; install the same everywhere"
                )
        for path, size in record_sizes(self._config).items():
            if (there := hello.sizes.get(path)) not in (None, size):
                problems.append(f"{path} has {there} bytes there and {size} here; give every machine the same records")
        own_config = self._config.model_dump(mode="json")
        if different := [key for key, value in own_config.items() if hello.config.get(key) != value]:
            problems.append(f"the configuration differs in {', '.join(different)}; start the same command everywhere")
        return problems

    def _name(self, rank: int) -> str:
        return f"node {rank} ({self._hellos[rank].host if rank else socket.gethostname()})"

    @contextmanager
    def _handed_out(self, job: TrainingJob | EvaluationJob, nodes: Sequence[int]) -> Iterator[Callable[[], bool]]:
        """Posts a job to the others among `nodes` and yields a look at it, which raises their errors.

        However the block is left, the job is over on all of them behind it.
        """
        assert self._mailbox is not None
        mailbox = self._mailbox
        waiting = [rank for rank in nodes if rank != 0]
        for rank in waiting:
            mailbox.post(f"jobs/{rank}/{next(self._posted[rank])}", Job(work=job))

        def all_ended() -> bool:
            for rank in list(waiting):
                ended = mailbox.read(f"ended/{job.number}/{rank}", Ended)
                if ended is None:
                    self._check_alive(rank)
                    continue
                waiting.remove(rank)
                if ended.kind != "done":
                    error = {"training": TrainingFailedError, "user": UserError, "other": RuntimeError}[ended.kind]
                    raise error(f"{self._name(rank)}: {ended.text}")
            return not waiting

        try:
            yield all_ended
        except BaseException:
            mailbox.post(f"cancel/{job.number}", Notice())
            self._wait_for(waiting, lambda rank: mailbox.read(f"ended/{job.number}/{rank}", Ended) is not None)
            raise

    def _check_alive(self, rank: int) -> None:
        assert self._mailbox is not None
        left = self._mailbox.read(f"left/{rank}", Notice)
        if left is not None:
            raise TrainingFailedError(f"{self._name(rank)} has left: {left.reason}; start it again on every machine")
        beats, now = self._mailbox.beats(rank), time.monotonic()
        before, since = self._seen.get(rank, (-1, now))
        if beats != before:
            self._seen[rank] = (beats, now)
        elif now - since > SILENCE:
            raise TrainingFailedError(
                f"{self._name(rank)} has not been heard of for {SILENCE:.0f} s; start it again on every machine"
            )

    def _end(self, error: BaseException | None) -> None:
        """Tells the others that the run is over, and gives them time to hear it: the messages end with this process."""
        if self._mailbox is None:
            return
        reason = "" if error is None else reason_of(error)
        self._mailbox.post("end", Notice(failed=error is not None, reason=reason))
        mailbox = self._mailbox
        self._wait_for(list(self._hellos), lambda rank: mailbox.read(f"left/{rank}", Notice) is not None)
        with suppress(OSError):
            os.unlink(self._folder / ".nodes")

    def _wait_for(self, ranks: Sequence[int], have: Callable[[int], bool]) -> None:
        """Waits until machines have done something, or are lost, or take too long for it."""
        deadline = time.monotonic() + _GOODBYE
        while (ranks := [rank for rank in ranks if not have(rank) and self._is_alive(rank)]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.1)

    def _is_alive(self, rank: int) -> bool:
        try:
            self._check_alive(rank)
        except TrainingFailedError:
            return False
        return True


def _look_again(*folders: Path) -> None:
    """Opens folders that another machine has written into, each before what is in it.

    NFS remembers for up to a minute that a name was not there, but asks again when the folder around it is opened.
    """
    for folder in folders:
        with suppress(OSError), os.scandir(folder):
            pass


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
