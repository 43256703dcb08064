"""A directed graph of stages that survives being killed: finished ones are skipped, a cut-off one continues.

A stage's fingerprint covers its own inputs and, through what it needs, everything before it. Its manifest
``stages/<name>.json`` says what they are; it is written when the stage starts (status "running"), about once a minute
while it runs, and when it is done. Run again:

- done, same fingerprint, outputs present: skipped;
- running, same fingerprint: run again on what it left (a training goes on from its newest checkpoint);
- anything else: its outputs belong to other inputs and are deleted before any stage runs. What was costly and is
  finished, or has something to go on from, is deleted only if asked for.
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
from datetime import datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from trainer.errors import UserError, listed
from trainer.files import write_json
from trainer.locks import holding
from trainer.pipeline.progress import Progress

SAVE_EVERY = 60.0  # seconds of a stage's time that a kill may take from its manifest


class Cancelled(Exception):
    """The run is ending; a stage that polls stops."""


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        name: unique; names the manifest.
        inputs: JSON-able description of what the outputs depend on, besides the stages it needs; the keys of objects
            are what a person is told has changed.
        needs: names of stages that must be done before.
        outputs: files and folders it writes, which nothing else writes.
        run: does the work; gets a :class:`StageContext`.
        after: names of stages that must be done before, although the outputs do not depend on theirs.
        costly: whether finished outputs are worth asking for before they are deleted.
        leaves: what it may leave besides, deleted with the outputs.
        half_done: whether an unfinished one has left work that is worth asking for too.
    """

    name: str
    inputs: Any
    needs: tuple[str, ...]
    outputs: tuple[Path, ...]
    run: Callable[[StageContext], None]
    after: tuple[str, ...] = ()
    costly: bool = False
    leaves: tuple[Path, ...] = ()
    half_done: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class StageContext:
    """What a running stage may use: its place among the parallel ones, and a way to say how far it is."""

    name: str
    slot: int
    progress: Progress
    cancelled: threading.Event
    alive: Callable[[], None] = lambda: None

    def report(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Shows progress, with a `note` on its speed; raises :class:`Cancelled` when the run is ending."""
        if self.cancelled.is_set():
            raise Cancelled
        self.alive()
        self.progress.update(self.name, done, total, unit, note)


def fingerprints(stages: Sequence[Stage]) -> dict[str, str]:
    """The fingerprint of every stage; stages must come after what they need."""
    found: dict[str, str] = {}
    for stage in stages:
        content = json.dumps([stage.name, stage.inputs, [found[need] for need in stage.needs]], sort_keys=True)
        found[stage.name] = hashlib.sha256(content.encode()).hexdigest()[:16]
    return found


def differences(old: Any, new: Any) -> list[str]:
    """What has changed from one stage's inputs to others, as ``training.learning_rate 0.002 -> 0.001``."""
    before, after = _flat(old), _flat(new)
    if before.get("format") != after.get("format"):
        return ["made by another version of the trainer"]  # whose keys may mean something else
    return [
        f"{key} {before.get(key, 'nothing')} -> {after.get(key, 'nothing')}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Values by dotted key, as JSON; objects in a list go by their names, where they have any."""
    if isinstance(value, dict):
        return {
            key: leaf
            for name, inner in value.items()
            for key, leaf in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
        }
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        items = {item["name"]: {key: inner for key, inner in item.items() if key != "name"} for item in value}
        return {prefix: json.dumps(list(items))} | _flat(items, prefix)
    return {prefix or "inputs": value if isinstance(value, str) else json.dumps(value)}


class _Manifest:
    """``stages/<name>.json`` of a stage at work; one that goes on keeps its start and the time spent before."""

    def __init__(self, path: Path, stage: Stage, fingerprint: str, before: dict[str, Any]) -> None:
        self.path = path
        self.content = {"stage": stage.name, "fingerprint": fingerprint, "inputs": stage.inputs}
        self.content["started"] = before.get("started") or _now()
        self._earlier = float(before.get("seconds", 0.0))
        self._begun = self._written = time.monotonic()

    def write(self, status: str = "running", **more: Any) -> float:
        """Returns the seconds that the stage has taken so far."""
        self._written = time.monotonic()
        seconds = self._earlier + self._written - self._begun
        write_json(self.path, self.content | more | {"seconds": round(seconds, 2), "status": status})
        return seconds

    def alive(self) -> None:
        """Called often: what is written now and then survives a kill."""
        if time.monotonic() - self._written >= SAVE_EVERY:
            self.write()


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
        """Costly stages that were done, or have something to go on from, on other inputs."""
        lost = []
        for stage in self.stages.values():
            manifest = self._manifest(stage)
            if not stage.costly or not manifest or manifest.get("fingerprint") == self.fingerprints[stage.name]:
                continue
            whole = manifest.get("status") == "done" and any(path.exists() for path in stage.outputs)
            if whole or stage.half_done():
                lost.append(stage.name)
        return lost

    def strangers(self) -> list[Path]:
        """What lies where a costly stage that has never started, or any stage of a new run, would delete it."""
        new = not self.directory.exists()
        return [
            path
            for stage in self.stages.values()
            if new or (stage.costly and not self._manifest(stage))
            for path in (*stage.outputs, *stage.leaves)
            if path.exists()
        ]

    def summary(self) -> str:
        """What is finished, and what a run would refuse to delete, in a line each."""
        done = sum(map(self.is_done, self.stages.values()))
        lines = [f"{done} of {len(self.stages)} stages are finished"]
        if found := self.strangers():
            named = listed([str(path) for path in found])
            lines.append(f"not made by this run, and deleted by a run with --overwrite: {named}")
        if lost := self.would_lose():
            why = self._changes(lost)
            lines.append(f"done for other inputs{why}, and deleted by a run with --overwrite: {listed(lost)}")
        return "\n".join(lines)

    def refuse_to_lose(self, overwrite: bool) -> None:
        """Raise :class:`UserError` if a run would delete :meth:`strangers` or what it :meth:`would_lose` unasked."""
        if not overwrite and (found := self.strangers()):
            raise UserError(
                f"not made by this run, and in its way: {listed([str(path) for path in found])}; --overwrite deletes "
                "it, another output folder keeps it"
            )
        lost = self.would_lose()
        if lost and not overwrite:
            raise UserError(
                f"work already done does not fit the configuration, the records or the model{self._changes(lost)}: "
                f"{listed(lost)}; --overwrite deletes it and does it again, another output folder keeps it"
            )

    def _changes(self, names: Sequence[str]) -> str:
        """In brackets, what is different for these stages and all that they need; empty if no manifest tells."""
        concerned = set(names)
        for stage in reversed(self.stages.values()):  # each after those it needs
            if stage.name in concerned:
                concerned.update(stage.needs)
        changes: dict[str, None] = {}
        for stage in self.outdated():
            if stage.name in concerned:
                manifest = self._manifest(stage)
                known = "inputs" in manifest  # older versions kept their hash only
                inputs = json.loads(json.dumps(stage.inputs))
                found = differences(manifest["inputs"], inputs) if known else ["made by another version of the trainer"]
                changes |= dict.fromkeys(found)
        return f" ({listed(list(changes))})" if changes else ""

    def run(self, overwrite: bool = False) -> None:
        """Runs what is not done. The first failure stops the others and is raised; what is done stays done.

        Raises:
            UserError: see :meth:`refuse_to_lose`.
        """
        self.refuse_to_lose(overwrite)
        self.directory.mkdir(parents=True, exist_ok=True)
        for stage in self.outdated():  # all of them now: nothing may read what belongs to other inputs
            # Of no inputs first: what a kill leaves half deleted would count as done when its own come back.
            write_json(self._path(stage), self._manifest(stage) | {"fingerprint": "", "status": "deleting"})
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
            before = self._manifest(stage)
            if before.get("fingerprint") != self.fingerprints[stage.name] or before.get("status") != "running":
                self._delete_outputs(stage)
                before = {}
            manifest = _Manifest(self._path(stage), stage, self.fingerprints[stage.name], before)
            manifest.write()
            self.progress.start(stage.name)
            try:
                stage.run(StageContext(stage.name, slot, self.progress, self._cancelled, manifest.alive))
            except BaseException:
                manifest.write()
                self.progress.stop(stage.name)
                raise
            self.progress.finish(stage.name, manifest.write("done", ended=_now()))
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


def _now() -> str:
    """Local time; stages of a run that start in the same second are still in order."""
    return datetime.now().isoformat(timespec="milliseconds")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Makes `directory` this process's own until the end of the ``with`` block, or of the process.

    Raises:
        UserError: another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with holding(directory / ".lock", f"another process is working on {directory}"):
        yield
