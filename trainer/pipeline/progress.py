"""What a person sees while the pipeline runs: bars with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence

from tqdm import tqdm

from trainer.bars import LINE_EVERY
from trainer.units import duration


class Progress:
    """One bar for the run and one for every stage at work. Safe to call from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._overall: tqdm | None = None
        self._bars: dict[str, tqdm] = {}
        self._last_line: dict[str, float] = {}
        self._tty = sys.stderr.isatty()

    def begin(self, stages: int, done: Sequence[str]) -> None:
        """Called once, with the number of stages and the names of those already done."""
        if done:
            self.say(f"{len(done)} of {stages} stages are already done and are skipped")
        if self._tty:
            self._overall = tqdm(total=stages, initial=len(done), desc="stages", unit="stage", position=0)

    def start(self, name: str) -> None:
        with self._lock:
            self._last_line[name] = time.monotonic()
        if not self._tty:
            self.say(f"{name} ...")

    def update(self, name: str, done: int, total: int, unit: str, note: str = "") -> None:
        """`done` of `total` units of a stage, and a `note`; a `total` of 0 is not known yet and shows nothing."""
        if not total:
            return
        with self._lock:
            if self._tty:
                bar = self._bars.get(name)
                if bar is None:
                    bar = self._bars[name] = tqdm(total=total, desc=f"  {name}", unit=unit, leave=False)
                bar.total = total
                bar.set_postfix_str(note, refresh=False)
                bar.update(done - bar.n)
                return
            if time.monotonic() - self._last_line.get(name, 0.0) < LINE_EVERY:
                return
            self._last_line[name] = time.monotonic()
        self.say(f"{name}: {done} of {total} {unit}s{note and ', ' + note}")

    def finish(self, name: str, seconds: float) -> None:
        self.stop(name)
        self.say(f"{name}: done in {duration(seconds)}")
        with self._lock:
            if self._overall is not None:
                self._overall.update(1)

    def stop(self, name: str) -> None:
        """Takes the stage's bar away."""
        with self._lock:
            bar = self._bars.pop(name, None)
            if bar is not None:
                bar.close()

    def end(self) -> None:
        with self._lock:
            for bar in [*self._bars.values(), *([self._overall] if self._overall is not None else [])]:
                bar.close()
            self._bars.clear()
            self._overall = None

    def say(self, text: str) -> None:
        """One line that does not break the bars."""
        tqdm.write(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr)
