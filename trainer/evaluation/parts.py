"""What ranks have finished, on disk: one file per rank, one line per batch, whole or not at all.

A line is written with its newline at the end, flushed, and forced to the disk before the next batch starts. A kill
can cut off the last line of a file only; such a line is dropped and its whole batch is done again, with the same
neighbours as before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer.evaluation.planning import Batch
from trainer.locks import holding

_CLOSED = 2**62
_ORPHANS_END = 30.0  # seconds


@dataclass(frozen=True)
class Finished:
    """A batch that is done.

    Attributes:
        batch: its number in the plan.
        results: per record, ``{"prediction"}`` or ``{"loss_sum", "tokens"}``.
        prompt_tokens: that went in, without padding.
        padded_tokens: that went in, with padding.
        generated_tokens: that came out, up to each record's end mark.
        started, ended: seconds since the epoch.
    """

    batch: int
    results: list[dict[str, Any]]
    prompt_tokens: int
    padded_tokens: int
    generated_tokens: int
    started: float
    ended: float


class PartFile:
    """Appends finished batches to a rank's own file."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._file = (directory / f"rank-{rank}.jsonl").open("ab")

    def append(self, finished: Finished) -> None:
        self._file.write(json.dumps(asdict(finished), ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def collect(directory: Path, plan: Sequence[Batch]) -> dict[int, Finished]:
    """Finished batches of all ranks by number; files with an unreadable line are rewritten without it."""
    done: dict[int, Finished] = {}
    for path in sorted(directory.glob("rank-*.jsonl")):
        kept: list[bytes] = []
        content = path.read_bytes()
        for line in content.splitlines(keepends=True):
            finished = _parse(line, plan)
            if finished is not None:
                kept.append(line)
                done.setdefault(finished.batch, finished)
        if sum(map(len, kept)) != len(content):
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(b"".join(kept))
            partial.replace(path)
    return done


def begun(output_dir: Path) -> bool:
    """Whether an unfinished evaluation has finished batches."""
    return any(path.stat().st_size for path in (output_dir / "parts").glob("rank-*.jsonl"))


class Tail:
    """Follows the part files while ranks write them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[Path, int] = {path: path.stat().st_size for path in directory.glob("rank-*.jsonl")}

    def __call__(self) -> Iterator[Finished]:
        """Batches that were finished since the last call."""
        for path in self._directory.glob("rank-*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in whole.splitlines():
                yield Finished(**json.loads(line))


class Claims:
    """Hands out positions in a list of batches to ranks of this machine that share `directory`, each once.

    Rank r starts with position r; after that whoever is free takes the next one.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "next"

    def open(self, ranks: int) -> None:
        """Starts from the beginning, with the first positions kept for their ranks."""
        self._path.write_text(str(ranks))

    def take(self, reserved: int | None = None) -> int:
        """The next position, or the `reserved` one; at least 2**62 once closed."""
        with self._alone():
            number = int(self._path.read_text())
            if number >= _CLOSED:
                return number
            if reserved is not None:
                return reserved
            self._path.write_text(str(number + 1))
            return number

    def close(self) -> None:
        """Hands out nothing more: ranks end after the batches they have."""
        with self._alone():
            self._path.write_text(str(_CLOSED))

    def _alone(self) -> AbstractContextManager[None]:
        return holding(self._path.with_suffix(".lock"), f"a rank holds on to {self._path}", patience=_ORPHANS_END)


@contextmanager
def sole_use(directory: Path) -> Iterator[None]:
    """Keeps other evaluations out of a folder.

    Raises:
        UserError: another process works in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with holding(directory / ".lock", f"another process is evaluating into {directory}"):
        yield


@contextmanager
def no_ranks(directory: Path) -> Iterator[None]:
    """Waits until ranks of a killed evaluation have ended, and lets none start meanwhile."""
    reason = f"ranks of an earlier evaluation still write into {directory}"
    with holding(directory / ".ranks", reason, patience=_ORPHANS_END):
        yield


@contextmanager
def as_rank(directory: Path) -> Iterator[None]:
    """Held by every rank while it writes."""
    with holding(directory / ".ranks", f"{directory} is being tidied up", shared=True, patience=_ORPHANS_END):
        yield


def busy_seconds(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: the time in which at least one rank was at work, restarts left out."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _parse(line: bytes, plan: Sequence[Batch]) -> Finished | None:
    """The batch of a line, or None for one that was cut off or is not of this plan."""
    if not line.endswith(b"\n"):
        return None
    try:
        finished = Finished(**json.loads(line))
        fits = len(finished.results) == len(plan[finished.batch].records)
    except (ValueError, TypeError, IndexError):
        return None
    return finished if fits and finished.batch >= 0 else None
