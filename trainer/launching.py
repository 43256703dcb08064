"""Starting training processes, watching them, and making sure none outlives its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from trainer.errors import UserError
from trainer.options import Options

ERROR_FILE = "error.txt"  # where a training process leaves the reason of its end
SAVE_FILE = "save_now"  # in a training's folder: asks it for a checkpoint
HANGS = "a process of the training hangs"  # begins the reason of a process that has waited for another too long
TERMINATED = "ended by SIGTERM"  # text of the interruption that this signal is
PARENT = "COTBAL_PARENT"  # environment of a process that is to end with its parent: the parent's process id
_PR_SET_PDEATHSIG = 1
_saves_asked = 0  # how often this process was sent SIGUSR1


class LaunchConfig(Options):
    """Where trainings run, and how many at once; for several machines see docs/machines.md."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: Annotated[int, Field(ge=1)] = Field(1, description="processes (GPUs) per training and machine")
    parallel: Annotated[int, Field(ge=1)] = Field(1, description="independent trainings at once on a machine")
    threads: Annotated[int, Field(ge=0)] = Field(0, description="CPU threads per process; 0 = cores shared evenly")
    nodes: Annotated[int, Field(ge=1)] = Field(1, description="machines that work on a run, each with the same command")
    nodes_per_training: Annotated[int, Field(ge=1)] = Field(
        1, description="machines that one training spans; the others train something else meanwhile"
    )

    @property
    def ranks(self) -> int:
        """Processes of one training, on all of its machines."""
        return self.processes * self.nodes_per_training

    @property
    def groups(self) -> int:
        """Groups of machines that train something of their own."""
        return self.nodes // self.nodes_per_training

    @property
    def slots(self) -> int:
        """Independent trainings at once, on all machines."""
        return self.parallel * self.groups

    @field_validator("nodes_per_training")
    @classmethod
    def _divides_the_nodes(cls, own: int, others: ValidationInfo) -> int:
        nodes = others.data.get("nodes", own)
        if nodes % own:
            raise ValueError(f"must divide launch.nodes, so that no machine is left over; launch.nodes is {nodes}")
        return own


class TrainingFailedError(RuntimeError):
    """A training process ended with an error; says why and where its whole output is."""


def connect_on_cpu() -> None:
    """Connects the processes of a training on CPUs, under torchrun's variables."""
    import deepspeed

    # Else it compiles an all-reduce on a machine's first run, for a minute, that inference alone calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")


def save_on_signal() -> None:
    """Makes SIGUSR1, which schedulers send some time before a job's end, ask every training for a checkpoint."""

    def ask(*_: object) -> None:
        global _saves_asked
        _saves_asked += 1

    signal.signal(signal.SIGUSR1, ask)


def stop_on_signal() -> None:
    """Makes SIGTERM, with which schedulers end a job, an interruption as Ctrl-C is: other machines are told of it.

    As a container's first process, this one would not hear it at all without a handler.
    """

    def stop(*_: object) -> None:
        raise KeyboardInterrupt(TERMINATED)

    signal.signal(signal.SIGTERM, stop)


@contextmanager
def starting() -> Iterator[None]:
    """Around the start of a process: SIGUSR1 does not end it while it imports, until it comes to ignore it.

    A scheduler sends it to every process of a job, and a signal that is blocked here is blocked in the process. So is
    Ctrl-C, until :func:`die_with_parent`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def die_with_parent(parent: int | None = None) -> None:
    """Asks the kernel to end this process when its parent ends, however that happens (Linux only).

    SIGUSR1 is the parent's to hear (:func:`save_on_signal`): where a scheduler sends it to all processes of a job, this
    one goes on. Ctrl-C, which a terminal sends to all of them, ends this one without a traceback: the parent says it.

    Args:
        parent: its process id, for ending now if it is gone already: a process takes seconds to get here. None:
            what ``PARENT`` in the environment says, if anything.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if parent is None:
            parent = int(os.environ.get(PARENT, os.getppid()))
        if os.getppid() != parent:
            os._exit(1)


def resolve_device(device: str) -> str:
    """``cpu`` or ``cuda`` for ``auto | cpu | cuda``.

    Raises:
        UserError: a GPU is asked for and this machine has none that torch can use.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "launch.device is 'cuda' but torch sees no GPU here; use 'auto' or 'cpu', or install a CUDA build of torch"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def rank_devices(device: str, ranks: int, first: int = 0) -> tuple[str, ...]:
    """A device for each of several processes of this machine: its own GPU, from number `first` on, or the CPU.

    Raises:
        UserError: there are too few GPUs.
    """
    if device == "cpu":
        return ("cpu",) * ranks
    import torch

    if first + ranks > torch.cuda.device_count():
        raise UserError(
            f"{first + ranks} processes take a GPU each and torch sees {torch.cuda.device_count()} here; "
            "lower launch.processes (--processes) or launch.parallel"
        )
    return tuple(f"cuda:{first + rank}" for rank in range(ranks))


def usable_cores() -> int:
    """CPU cores that this process may use: a scheduler gives a job a part of a machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_process(launch: LaunchConfig) -> int:
    """CPU threads of one process: as configured, else the cores shared evenly."""
    return launch.threads or max(1, usable_cores() // (launch.processes * launch.parallel))


@dataclass(frozen=True)
class Meeting:
    """Where the machines of one training meet.

    Attributes:
        rank: of this machine in the training; machine 0 has the processes from rank 0 on.
        nodes: machines of the training.
        host, port: of machine 0.
        interface: of the network to the others, by name; None if it is not known.
    """

    rank: int
    nodes: int
    host: str
    port: int
    interface: str | None = None


def run_training(
    spec: Path,
    launch: LaunchConfig,
    device: str,
    place: int,
    log: Path,
    poll: Callable[[], None] = lambda: None,
    meeting: Meeting | None = None,
) -> None:
    """Runs ``trainer.training`` on `spec`, under torchrun for several processes, and waits for it.

    Args:
        spec: path of a ``TrainingSpec`` in JSON.
        launch: processes and threads.
        device: ``cpu`` or ``cuda``.
        place: which of this machine's ``launch.parallel`` places this training takes; the i-th has the i-th group of
            GPUs.
        log: file that receives all output.
        poll: called about twice a second while the training runs.
        meeting: with the other machines of the training; None is a training of this machine alone.

    Raises:
        TrainingFailedError: the training ended with an error.
    """
    # torchrun takes options that it is not given from PET_*: where those start one process per machine of a run, a
    # training of one machine would wait for the others.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    environment |= {
        "OMP_NUM_THREADS": str(threads_per_process(launch)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        PARENT: str(os.getpid()),
    }
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    elif launch.parallel > 1:
        given = environment.get("CUDA_VISIBLE_DEVICES")  # a scheduler's or the user's: numbers count within it
        visible = given.split(",") if given else [str(index) for index in range(launch.processes * launch.parallel)]
        first = place * launch.processes
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[first : first + launch.processes])
    if meeting and meeting.interface:  # gloo would take what this machine's name stands for, often its own loopback
        environment.setdefault("GLOO_SOCKET_IFNAME", meeting.interface)
    command = [sys.executable]
    if launch.processes > 1 or meeting:
        command += ["-m", "trainer.launching", f"--nproc_per_node={launch.processes}"]
        command += _torchrun_options(meeting) if meeting else ["--standalone"]
    else:  # what torchrun would set, without the seconds that its own process takes to start
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command += ["-m", "trainer.training", str(spec)]
    reason = spec.parent / ERROR_FILE
    if meeting is None or meeting.rank == 0:
        reason.unlink(missing_ok=True)
    heard, save_now = _saves_asked, spec.parent / SAVE_FILE
    with log.open("ab") as output:
        with starting():
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                poll()
                if heard != _saves_asked:
                    heard = _saves_asked
                    save_now.touch()
                time.sleep(0.5)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            save_now.unlink(missing_ok=True)
    if process.returncode:
        if process.returncode < 0:
            _note_killed(reason, {f"process {process.pid}": process.returncode})
        said = reason.read_text(errors="replace") if reason.exists() else ""  # a full disk leaves it empty
        text = said or log.read_text(errors="replace")
        tail = "\n".join("    " + line for line in text.splitlines()[-20:])
        raise TrainingFailedError(
            f"training {spec.parent.name} ended with code {process.returncode}; all its output is in {log}:\n{tail}"
        )


def _note_killed(reason: Path, exit_codes: dict[str, int]) -> None:
    """Adds to a training's reason which of its processes were killed: they could not, and others only saw them go.

    Args:
        reason: path of the training's ``ERROR_FILE``.
        exit_codes: of processes by name; negative ones are signals, of which SIGTERM is torchrun's to the others.
    """
    # torchrun itself kills one that hangs.
    hangs = reason.exists() and reason.read_text(errors="replace").startswith(HANGS)
    for name, code in exit_codes.items():
        if code < 0 and code != -signal.SIGTERM:
            why = "" if hangs else "; out of memory? The kernel does that when a machine or its share of it is full"
            with reason.open("a") as file:
                file.write(
                    f"\n{name} on {socket.gethostname()} was ended by signal {-code} ({signal.strsignal(-code)})"
                    f"{why if code == -signal.SIGKILL else ''}\n"
                )


def _torchrun_options(meeting: Meeting) -> list[str]:
    return [
        f"--nnodes={meeting.nodes}",
        f"--node_rank={meeting.rank}",
        f"--master_addr={meeting.host}",
        f"--master_port={meeting.port}",
    ]


def main() -> None:
    """torchrun that ends with the process that started it; the last argument is the path of a ``TrainingSpec``."""
    die_with_parent()
    os.environ[PARENT] = str(os.getpid())  # of the processes that torchrun starts
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        ended = {f"rank {rank}": failure.exitcode for rank, failure in error.failures.items()}
        _note_killed(Path(sys.argv[-1]).with_name(ERROR_FILE), ended)
        raise


if __name__ == "__main__":
    main()
