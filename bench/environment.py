"""Where numbers come from: device, clocks, versions, commit. Neither host names nor paths."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "cut-cross-entropy",
    "liger-kernel",
    "quack-kernels",
    "nvidia-cutlass-dsl",
)
ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cotbal_kernels", "bench", "csrc")
SOURCES = {".py", ".cu", ".cuh", ".cpp", ".h"}


def describe(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to judge a number or repeat it."""
    return {
        "device": device_name(device),
        "kind": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # of the machine, in the minute before the run
        "clocks": clocks(device),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "commit": commit(),
        "sources": sources(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def clocks(device: torch.device) -> str | None:
    """SM and memory clock, their maxima, power and limit, as nvidia-smi says at this moment."""
    if device.type != "cuda":
        return None
    fields = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    return _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", str(device.index or 0)])


def commit() -> str | None:
    """The checked-out commit, marked where files of the packages differ from it; None in a copy without git."""
    head = _output(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    if head is None:
        return None
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--", *FOLDERS])
    return head + (" with changes" if changed else "")


def sources() -> str:
    """Digest of what was run: a copy without git can be told from its commit's files by the same function."""
    digest = hashlib.sha256()
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES)
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
