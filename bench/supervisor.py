"""A run in a process of its own, which is ended when a turn does not end; another one goes on without the culprit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import turns
from bench.cases import Preset
from bench.run import note_stop
from bench.turns import Turn

LOST_DEVICE = 75  # exit status of a process that cannot use the device any more and has noted why
GRACE_SECONDS = 60.0  # for the case that is under way when the preset's time is over
_POLL_SECONDS = 0.25


def supervise(command: Sequence[str], results: Path, preset: Preset, say: Callable[[str], Any] = print) -> int:
    """Exit status of ``command``, started again with ``--resume`` as often as a peer stops it.

    Every stop leaves a peer or a case out of what is still to do, so there is an end.
    """
    command = list(command)

    def stop(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)  # an exception, so that the process is not left behind

    before = signal.signal(signal.SIGTERM, stop)
    try:
        while True:
            status, turn, why = _watched(command, results, preset)
            if status in (0, 1, 2):
                return status
            if status != LOST_DEVICE:
                if turn is None:
                    say(f"bench: before its first case the run {why}")
                    return 1
                say(f"\n{turn.case}: {note_stop(results, preset, turn, turn.peer, why)}")
            command += [] if "--resume" in command else ["--resume"]
    finally:
        signal.signal(signal.SIGTERM, before)


def overdue(turn: Turn, preset: Preset, now: float) -> tuple[Turn, str] | None:
    """The turn to blame, and what for, where the run has to be ended. At the end of its time nobody is to blame."""
    minutes = preset.minutes + GRACE_SECONDS / 60
    if now - turn.started > 60 * minutes:
        return replace(turn, peer=None), f"out of time: the run was ended after {minutes:g} minutes"
    if now - turn.began > preset.turn_seconds:
        return turn, f"did not end within {preset.turn_seconds:g} s"
    return None


def _watched(command: list[str], results: Path, preset: Preset) -> tuple[int, Turn | None, str]:
    """Exit status, the last turn, and what became of the process."""
    turns.file_of(results).unlink(missing_ok=True)
    # A session of its own: compilers that it has started end with it.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            turn = turns.read(results)
            if turn is not None and (found := overdue(turn, preset, time.monotonic())):
                return -signal.SIGKILL, *found
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, turns.read(results), f"ended its process: {_named(process.returncode)}"


def _named(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
