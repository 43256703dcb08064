"""The tests marked ``gpu``, in several processes at once: most of their time is compiling, on the host.

After an illegal access, or a crash, a process can do nothing more on the device: another one takes the tests that are
left, so that one bug costs one test.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import command

LOST_DEVICE = 75  # exit status, see tests/cotbal_kernels/gpu_device.py
# Each process would start one compiler per core.
_ONE_COMPILER = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
_PYTEST = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-o", "addopts="]


def run(directory: Path, left: Callable[[], float]) -> dict[str, Any]:
    """Counts, names of what failed, and whether every test has run; their log is ``directory/gpu_tests.log``."""
    # Only the files that have some: collecting the others takes as long as many tests.
    files = [
        str(path.relative_to(command.ROOT))
        for path in sorted((command.ROOT / "tests/cotbal_kernels").glob("test_*.py"))
        if "mark.gpu" in path.read_text()
    ]
    status, output = command.run([*_PYTEST, "--collect-only", "-q", "--disable-warnings", *files], left())
    names = [line for line in output.splitlines() if line.startswith("tests/") and "::" in line]
    if status != 0:
        return _found(names, {}, [status], output)
    for old in directory.glob("gpu_tests_*.log"):  # of a run that was ended from outside
        old.unlink()
    workers = min(8, max(1, (os.cpu_count() or 1) // 2), len(names))
    with ThreadPoolExecutor(workers) as pool:
        logs = (directory / f"gpu_tests_{part}.log" for part in range(workers))
        parts = list(pool.map(lambda part, log: _run_part(part, log, left), _dealt(names, workers), logs))
    _join_logs(directory)
    kinds = {name: kind for part in parts for name, kind in part[0].items()}
    worst = next((part for part in parts if part[1] not in (0, 1)), parts[0])
    return _found(names, kinds, [part[1] for part in parts], worst[2])


def _join_logs(directory: Path) -> None:
    """One file to take home instead of one or more of every process."""
    with (directory / "gpu_tests.log").open("w") as whole:
        for part in sorted(directory.glob("gpu_tests_*.log")):
            whole.write(f"##### {part.name}\n{part.read_text(errors='replace')}\n")
            part.unlink()


def _dealt(names: list[str], hands: int) -> list[list[str]]:
    """Neighbours compile much the same: they go to different processes, which finish together."""
    return [names[hand::hands] for hand in range(hands)]


def _run_part(names: list[str], log: Path, left: Callable[[], float]) -> tuple[dict[str, str], int | str, str]:
    """Outcome of every test, and exit status and output of the last process."""
    kinds: dict[str, str] = {}
    status: int | str = "timeout"
    output = ""
    processes = 0
    while names and left() > 0:
        here = log.with_suffix(f".{processes}.log") if processes else log
        status, output = command.run([*_PYTEST, "-v", "--tb=short", *names], left(), here, _ONE_COMPILER)
        found = outcomes(output)
        kinds |= found
        names = [name for name in names if name not in kinds]
        crashed = isinstance(status, int) and status < 0
        if names and (crashed or (status == LOST_DEVICE and not found)):
            kinds[names.pop(0)] = f"ended its process: {status}"
        elif status != LOST_DEVICE:
            break
        processes += 1
    return kinds, status, output


def outcomes(log: str) -> dict[str, str]:
    """Outcomes by name of ``pytest -v`` so far, whether it came to its end or not."""
    return dict(re.findall(r"^(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR)\b", log, re.MULTILINE))


def _found(names: list[str], kinds: dict[str, str], statuses: list[int | str], output: str) -> dict[str, Any]:
    failures = {name: kind for name, kind in kinds.items() if kind not in ("PASSED", "SKIPPED")}
    return {
        "passed": sum(kind == "PASSED" for kind in kinds.values()),
        "skipped": sum(kind == "SKIPPED" for kind in kinds.values()),
        "failed": len(failures),
        "failures": failures,
        "not_run": [name for name in names if name not in kinds],
        "exit_statuses": statuses,
        "tail": output[-600:],
    }


def stopped(found: dict[str, Any]) -> bool:
    """Whether pytest ended for neither its tests nor the time: it is not installed, or collecting crashed."""
    tested = found["passed"] or found["failed"]
    return not tested or not all(status in (0, 1, "timeout") or found["failed"] for status in found["exit_statuses"])
