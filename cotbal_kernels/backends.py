"""The registry through which the ops find a backend by name when they run, and the choice of "auto"."""

import importlib
import os

import torch

from . import portable
from .interface import Backend

BACKENDS: dict[str, Backend] = {"portable": portable}
# Imported when first asked for: the module that says why it cannot run here, and the backend.
_GPU_BACKENDS = {"triton": ("triton_backend", "triton_backend"), "cuda": ("cuda_kernels", "cuda_backend")}
DEFAULT = os.environ.get("COTBAL_BACKEND", "") or "auto"


def register_backend(name: str, backend: Backend) -> None:
    """Make ``backend="name"`` available to the public functions."""
    BACKENDS[name] = backend


def unavailable_reason(name: str) -> str | None:
    """Why the GPU backend ``name`` cannot run on this machine and what to do about it, or None."""
    try:
        judge, backend = (importlib.import_module(f".{module}", __package__) for module in _GPU_BACKENDS[name])
    except ImportError as error:
        return f"{error}; `pip install {error.name}`"
    reason: str | None = judge.unavailable_reason()
    if reason is None:
        BACKENDS[name] = backend
    return reason


def check_backend_name(name: str) -> None:
    """Raise ``ValueError`` unless ``name`` is "auto", "reference" or a backend that this machine can run."""
    known = ("auto", "reference", *sorted({*BACKENDS, *_GPU_BACKENDS}))
    if name not in known:
        raise ValueError(f"backend={name!r} does not exist; available backends: {', '.join(map(repr, known))}")
    if name in _GPU_BACKENDS and name not in BACKENDS:
        reason = unavailable_reason(name)
        if reason is not None:
            raise ValueError(f"backend={name!r} cannot run here: {reason}")


@torch.compiler.assume_constant_result
def resolve_backend(name: str, device_type: str) -> str:
    """Return the name of a backend that runs on ``device_type``, or raise ``ValueError`` saying why there is none.

    "auto" is COTBAL_BACKEND if that is set; else "triton" on a CUDA device that it supports and "portable"
    anywhere else. ("reference" never gets here.)
    """
    if name == "auto":
        name = DEFAULT
    check_backend_name(name)
    if name == "auto":
        return "triton" if device_type == "cuda" and unavailable_reason("triton") is None else "portable"
    if name in _GPU_BACKENDS and device_type != "cuda":
        raise ValueError(f"backend={name!r} needs tensors on a CUDA device, got {device_type}")
    return name
