"""A directed graph of stages that survives being killed: finished ones are skipped, a cut-off one continues.

A stage's fingerprint covers its own inputs and, through what it needs, everything before it. Its manifest
``stages/<name>.json`` is written when it starts (status "running") and when it is done. Run again:

- done, same fingerprint, outputs present: skipped;
- running, same fingerprint: run again on what it left (a training goes on from its newest checkpoint);
- anything else: its outputs are deleted first, since they belong to other inputs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

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
    """

    name: str
    inputs: Any
    needs: tuple[str, ...]
    outputs: tuple[Path, ...]
    run: Callable[[StageContext], None]


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

    def run(self) -> None:
        """Runs what is not done. The first failure stops the others and is raised; what is done stays done."""
        self.directory.mkdir(parents=True, exist_ok=True)
        done = {stage.name for stage in self.stages.values() if self.is_done(stage)}
        waiting = [stage for stage in self.stages.values() if stage.name not in done]
        self.progress.begin(len(self.stages), sorted(done))
        running: dict[Future[None], Stage] = {}
        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                while waiting or running:
                    for stage in [stage for stage in waiting if done.issuperset(stage.needs)]:
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
                for path in stage.outputs:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
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


def write_json(path: Path, content: Any) -> None:
    """Writes JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)
