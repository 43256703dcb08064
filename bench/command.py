"""A command with a time limit, whose end is the end of everything that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(
    arguments: list[str], seconds: float, log: Path | None = None, variables: dict[str, str] | None = None
) -> tuple[int | str, str]:
    """Exit status, or "timeout", and what was printed until then, which a ``log`` holds at any time.

    A command that takes too long ends with everything that it started: a compiler would go on and hold its output.
    """
    with log.open("w+b") if log else tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(variables or {})},
            )
        except OSError as error:
            return str(error), ""
        status: int | str
        try:
            status = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            with suppress(ProcessLookupError):  # what it has left behind, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return status, output.read().decode(errors="replace")
