"""A process that measures its own peak memory; :func:`bench.memory.process_peak` starts it:

    python -m bench.memory_process '{"peer": "eager", "suite": "linear", "case": {...}, "step": true}'

After one step has warmed it up (compilation, threads), the kernel's high-water mark of the resident set is set back,
the step runs once more, and the rise is what it needed. Where the mark cannot be set back, the peak of a process that
makes the step minus the peak of one that does not takes its place.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import linear, model
from bench.cases import LinearCase, ModelCase
from bench.peers import by_name
from bench.problems import make


def _measure(job: dict[str, Any]) -> dict[str, Any]:
    step, clear, outputs = _prepared(job)
    if not job["step"]:
        return {"bytes": _peak_of_process(), "reset": False}
    step()
    clear()
    gc.collect()
    _return_freed_memory()
    resting = _status("VmRSS")
    if not _reset_high_water_mark():
        return {"bytes": _peak_of_process() - outputs, "reset": False}
    step()
    return {"bytes": _status("VmHWM") - resting - outputs, "reset": True}


def _prepared(job: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """The step, what clears up after it, and the bytes of its outputs."""
    peer = by_name(job["peer"])
    if job["suite"] == "model":
        return *model.step_for_memory(peer, ModelCase(**job["case"])), 0
    case = LinearCase(**job["case"])
    problem = make(case, torch.device("cpu"))
    outputs = sum(leaf.nbytes for leaf in problem.leaves.values())
    return lambda: linear.run_step(peer, problem, case), problem.clear, outputs


def _peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _return_freed_memory() -> None:
    """Give back what malloc keeps, or the second step would find its memory resident already."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # not glibc
        return


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
