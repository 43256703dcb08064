"""Peak memory of one step beyond its inputs and outputs.

On a CUDA device the allocator counts. On a CPU a fresh process measures itself:

    python -m bench.memory '{"peer": "eager", "case": {...}}'

After one step has warmed it up (compilation, threads), the kernel's high-water mark of the resident set is set back,
the step runs once more, and the rise is what it needed. Where the mark cannot be set back, the peak of a process that
makes the step minus the peak of one that does not takes its place.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.cases import LinearCase, ModelCase


def cuda_peak(step: Callable[[], Any], output_bytes: int) -> int:
    """Bytes above what is allocated before the step, without its outputs. The step leaves its outputs allocated."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - output_bytes)


def process_peak(peer: str, case: LinearCase | ModelCase, seconds: float = 300.0) -> int:
    """Bytes that a fresh process of its own needs for the step, beyond inputs and outputs.

    Raises:
        RuntimeError: the process fails; its last line is the message.
    """
    with_step = _run(peer, case, True, seconds)
    if with_step["reset"]:
        return max(0, int(with_step["bytes"]))
    return max(0, int(with_step["bytes"]) - int(_run(peer, case, False, seconds)["bytes"]))


def _run(peer: str, case: LinearCase | ModelCase, step: bool, seconds: float) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(case).items() if name != "suite"}
    job = json.dumps({"peer": peer, "suite": case.suite, "case": fields, "step": step})
    command = [sys.executable, "-m", "bench.memory", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the measuring process took more than {seconds:.0f} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"the measuring process failed: {lines[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


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
    from bench.linear import by_name, run_step

    peer = by_name(job["peer"])
    if job["suite"] == "model":
        from bench.model import step_for_memory

        return *step_for_memory(peer, ModelCase(**job["case"])), 0
    from bench.problems import make

    case = LinearCase(**job["case"])
    problem = make(case, torch.device("cpu"))
    outputs = sum(leaf.nbytes for leaf in problem.leaves.values())
    return lambda: run_step(peer, problem, case), problem.clear, outputs


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
