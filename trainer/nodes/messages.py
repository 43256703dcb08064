"""What machines of a run tell each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator

from trainer.errors import UserError
from trainer.evaluation.spec import EvaluationSpec
from trainer.launching import LaunchConfig, TrainingFailedError

# Errors quote file names and records, which may hold what is no Unicode text and would not become a message.
Quoting = Annotated[str, BeforeValidator(lambda text: text.encode(errors="replace").decode())]


class Hello(BaseModel):
    """A machine has come.

    Attributes:
        host, address: its name, and its address as node 0 can reach it.
        versions: of what must be the same everywhere, by name.
        device: ``cpu`` or ``cuda``.
        config: the configuration that it was started with.
        sizes: bytes of every record file by path; None of one that it does not see.
        problems: why it cannot take part.
    """

    host: str
    address: str
    versions: dict[str, str]
    device: str
    config: dict[str, Any]
    sizes: dict[str, int | None]
    problems: list[Quoting]


class SharedFolder(BaseModel):
    """A file that every machine must be able to read, and what is in it: the run's folder is one folder."""

    path: Path
    content: str


class TrainingJob(BaseModel):
    """A training, or one machine's part in it.

    Attributes:
        number: of the job.
        spec: path of a ``TrainingSpec`` in JSON.
        log: gets all output of the first machine; that of the others goes into files beside it.
        launch: processes and threads.
        place: which group of GPUs it takes on each of its machines.
        nodes: ranks of its machines; the first one has rank 0 of the training.
        addresses: of its machines, as node 0 reaches them; empty for node 0, whose address each machine knows.
    """

    number: int
    spec: Path
    log: Path
    launch: LaunchConfig
    place: int
    nodes: tuple[int, ...]
    addresses: tuple[str, ...]


class EvaluationJob(BaseModel):
    """An evaluation on one machine."""

    number: int
    spec: EvaluationSpec
    place: int


class Job(BaseModel):
    """Work for one machine: one of the two."""

    work: TrainingJob | EvaluationJob


class Port(BaseModel):
    """Where the processes of a training meet; chosen by its first machine."""

    port: int


class Advance(BaseModel):
    """How far an evaluation is."""

    done: int
    total: int
    note: str


class Ended(BaseModel):
    """A machine's part of a job is over.

    Attributes:
        kind: ``done``, or what kind of error: a training process's, a user's, or any other.
        text: of the error.
    """

    kind: Literal["done", "training", "user", "other"] = "done"
    text: Quoting = ""


class Notice(BaseModel):
    """Something that has no more to it than a reason: a job is cancelled, the run is over, a machine leaves."""

    failed: bool = False
    reason: Quoting = ""


def reason_of(error: BaseException) -> str:
    """What to tell other machines of an error: its text, behind its kind where the text was not written to be read."""
    text = str(error).strip()
    if isinstance(error, KeyboardInterrupt):
        return text or "interrupted"
    if text and isinstance(error, (UserError, TrainingFailedError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
