"""Peak memory of one step beyond its inputs and outputs: the allocator counts on a CUDA device, a fresh process
(bench/memory_process.py) measures itself on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
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
    command = [sys.executable, "-m", "bench.memory_process", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the measuring process took more than {seconds:.0f} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"the measuring process failed: {lines[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
