"""The registry through which the ops find a backend by name when they run, and the choice of "auto"."""

import importlib
import os

import torch

from . import portable
from .interface import Backend

BACKENDS: dict[str, Backend] = {"portable": portable}
# Modules imported when first asked for; each says why it cannot run here.
_GPU_BACKENDS = {"triton": "triton_backend", "cuda": "cuda_backend"}
DEFAULT = os.environ.get("COTBAL_BACKEND", "") or "auto"
# What was found out about a backend on a device: at every step the driver, or an import that fails, would cost more
# than a launch.
_reasons: dict[tuple[str, torch.device | None], str | None] = {}


def register_backend(name: str, backend: Backend) -> None:
    """Make ``backend="name"`` available to the public functions."""
    BACKENDS[name] = backend


def unavailable_reason(name: str, device: torch.device | None = None) -> str | None:
    """Why the GPU backend ``name`` cannot run on ``device`` and what to do about it, or None.

    Without a device: on none of this machine.
    """
    if (name, device) not in _reasons:
        _reasons[name, device] = _find_reason(name, device)
    return _reasons[name, device]


def _find_reason(name: str, device: torch.device | None) -> str | None:
    try:
        backend = importlib.import_module(f".{_GPU_BACKENDS[name]}", __package__)
    except ImportError as error:
        return f"{error}; `pip install {error.name}`"
    reason: str | None = backend.unavailable_reason(device)
    if reason is None:
        BACKENDS[name] = backend
    return reason


def check_backend_name(name: str, device: torch.device | None = None) -> None:
    """Raise ``ValueError`` unless ``name`` is "auto", "reference" or a backend that ``device`` can run.

    Without a device: that some device of this machine can run.
    """
    known = ("auto", "reference", *sorted({*BACKENDS, *_GPU_BACKENDS}))
    if name not in known:
        raise ValueError(f"backend={name!r} does not exist; available backends: {', '.join(map(repr, known))}")
    if name in _GPU_BACKENDS:
        reason = unavailable_reason(name, device)
        if reason is not None:
            raise ValueError(f"backend={name!r} cannot run {'here' if device is None else f'on {device}'}: {reason}")


@torch.compiler.assume_constant_result
def resolve_backend(name: str, device: torch.device) -> str:
    """Return the name of a backend that runs on ``device``, or raise ``ValueError`` saying why there is none.

    "auto" is COTBAL_BACKEND if that is set; else "triton" on a CUDA device that it supports and "portable"
    anywhere else. ("reference" never gets here.)
    """
    if name == "auto":
        name = DEFAULT
    if name == "reference":  # float64, and no op
        raise ValueError("COTBAL_BACKEND must be a backend to train with: pass backend='reference' to the call instead")
    on_cuda = device.type == "cuda"
    if name == "auto":
        return "triton" if on_cuda and unavailable_reason("triton", device) is None else "portable"
    check_backend_name(name, device if on_cuda else None)
    if name in _GPU_BACKENDS and not on_cuda:
        raise ValueError(f"backend={name!r} needs tensors on a CUDA device, got {device}")
    return name
