"""A directed graph of stages that survives being killed: finished ones are skipped, a cut-off one continues.

A stage's fingerprint covers its own inputs and, through what it needs, everything before it. Its manifest
``stages/<name>.json`` is written when it starts (status "running") and when it is done. Run again:

- done, same fingerprint, outputs present: skipped;
- running, same fingerprint: run again on what it left (a training goes on from its newest checkpoint);
- anything else: its outputs belong to other inputs and are deleted before any stage runs. What was costly and is
  finished is deleted only if asked for.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from trainer.errors import UserError, listed
from trainer.files import write_json
from trainer.locks import holding
from trainer.pipeline.progress import Progress


class Cancelled(Exception):
    """The run is ending; a stage that polls stops."""


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        name: unique; names the manifest.
        inputs: JSON-able description of what the outputs depend on, besides the stages it needs.
        needs: names of stages that must be done before.
        outputs: files and folders it writes, which nothing else writes.
        run: does the work; gets a :class:`StageContext`.
        after: names of stages that must be done before, although the outputs do not depend on theirs.
        costly: whether finished outputs are worth asking for before they are deleted.
        leaves: what it may leave besides, deleted with the outputs.
    """

    name: str
    inputs: Any
    needs: tuple[str, ...]
    outputs: tuple[Path, ...]
    run: Callable[[StageContext], None]
    after: tuple[str, ...] = ()
    costly: bool = False
    leaves: tuple[Path, ...] = ()


@dataclass(frozen=True)
class StageContext:
    """What a running stage may use: its place among the parallel ones, and a way to say how far it is."""

    name: str
    slot: int
    progress: Progress
    cancelled: threading.Event

    def report(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Shows progress, with a `note` on its speed; raises :class:`Cancelled` when the run is ending."""
        if self.cancelled.is_set():
            raise Cancelled
        self.progress.update(self.name, done, total, unit, note)


def fingerprints(stages: Sequence[Stage]) -> dict[str, str]:
    """The fingerprint of every stage; stages must come after what they need."""
    found: dict[str, str] = {}
    for stage in stages:
        content = json.dumps([stage.name, stage.inputs, [found[need] for need in stage.needs]], sort_keys=True)
        found[stage.name] = hashlib.sha256(content.encode()).hexdigest()[:16]
    return found


class StageRunner:
    """Runs stages in dependency order, up to `parallel` at once.

    Args:
        directory: folder of the manifests.
        stages: every stage, each after those it needs.
        parallel: stages at once.
        progress: where to show what happens.
    """

    def __init__(self, directory: Path, stages: Sequence[Stage], parallel: int, progress: Progress) -> None:
        self.directory = directory
        self.stages = {stage.name: stage for stage in stages}
        self.fingerprints = fingerprints(stages)
        self.parallel = parallel
        self.progress = progress
        self._cancelled = threading.Event()
        self._slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(parallel):
            self._slots.put(slot)

    def is_done(self, stage: Stage) -> bool:
        """Whether the stage ran to its end on these very inputs and its outputs are there."""
        manifest = self._manifest(stage)
        return (
            manifest.get("status") == "done"
            and manifest.get("fingerprint") == self.fingerprints[stage.name]
            and all(path.exists() for path in stage.outputs)
        )

    def outdated(self) -> list[Stage]:
        """Stages that have been started on other inputs than these."""
        return [
            stage
            for stage in self.stages.values()
            if self._manifest(stage).get("fingerprint", self.fingerprints[stage.name]) != self.fingerprints[stage.name]
        ]

    def would_lose(self) -> list[str]:
        """Costly stages whose outputs were finished on other inputs, or are there although no stage has made them."""
        lost = []
        for stage in self.stages.values():
            manifest = self._manifest(stage)
            other = manifest.get("fingerprint") != self.fingerprints[stage.name] and manifest.get("status") == "done"
            if stage.costly and (other or not manifest) and any(path.exists() for path in stage.outputs):
                lost.append(stage.name)
        return lost

    def summary(self) -> str:
        """What is finished, and what a run would delete, in a line each."""
        done = sum(map(self.is_done, self.stages.values()))
        lines = [f"{done} of {len(self.stages)} stages are finished"]
        if lost := self.would_lose():
            lines.append(f"finished for other inputs, and deleted by a run with --overwrite: {listed(lost)}")
        return "\n".join(lines)

    def refuse_to_lose(self, overwrite: bool) -> None:
        """Raise :class:`UserError` if a run would delete finished costly outputs without being asked to."""
        lost = self.would_lose()
        if lost and not overwrite:
            raise UserError(
                f"finished work does not fit the configuration, the records or the model: {listed(lost)}; "
                "--overwrite deletes it and does it again, another output folder keeps it"
            )

    def run(self, overwrite: bool = False) -> None:
        """Runs what is not done. The first failure stops the others and is raised; what is done stays done.

        Raises:
            UserError: see :meth:`refuse_to_lose`.
        """
        self.refuse_to_lose(overwrite)
        self.directory.mkdir(parents=True, exist_ok=True)
        for stage in self.outdated():  # all of them now: nothing may read what belongs to other inputs
            self._delete_outputs(stage)
            self._path(stage).unlink()
        done = {stage.name for stage in self.stages.values() if self.is_done(stage)}
        waiting = [stage for stage in self.stages.values() if stage.name not in done]
        self.progress.begin(len(self.stages), sorted(done))
        running: dict[Future[None], Stage] = {}
        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                while waiting or running:
                    for stage in [stage for stage in waiting if done.issuperset((*stage.needs, *stage.after))]:
                        if len(running) < self.parallel:
                            waiting.remove(stage)
                            running[pool.submit(self._run_one, stage)] = stage
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        stage = running.pop(future)
                        future.result()
                        done.add(stage.name)
            except BaseException:
                self._cancelled.set()
                raise
            finally:
                self.progress.end()

    def _run_one(self, stage: Stage) -> None:
        slot = self._slots.get()
        try:
            manifest = self._manifest(stage)
            before = 0.0
            if manifest.get("fingerprint") == self.fingerprints[stage.name] and manifest.get("status") == "running":
                before = float(manifest.get("seconds", 0.0))
            else:
                self._delete_outputs(stage)
            self._write(stage, "running", before)
            self.progress.start(stage.name)
            started = time.monotonic()
            try:
                stage.run(StageContext(stage.name, slot, self.progress, self._cancelled))
            except BaseException:
                self._write(stage, "running", before + time.monotonic() - started)
                self.progress.stop(stage.name)
                raise
            seconds = before + time.monotonic() - started
            self._write(stage, "done", seconds)
            self.progress.finish(stage.name, seconds)
        finally:
            self._slots.put(slot)

    def _delete_outputs(self, stage: Stage) -> None:
        for path in (*stage.outputs, *stage.leaves):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _path(self, stage: Stage) -> Path:
        return self.directory / f"{stage.name}.json"

    def _manifest(self, stage: Stage) -> dict[str, Any]:
        try:
            return json.loads(self._path(stage).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def _write(self, stage: Stage, status: str, seconds: float) -> None:
        write_json(
            self._path(stage),
            {
                "stage": stage.name,
                "fingerprint": self.fingerprints[stage.name],
                "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
                "seconds": round(seconds, 2),
                "status": status,
            },
        )


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Makes `directory` this process's own until the end of the ``with`` block, or of the process.

    Raises:
        UserError: another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with holding(directory / ".lock", f"another process is working on {directory}"):
        yield
