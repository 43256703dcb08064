"""What every peer offers to the benchmark, whether it is installed or not.

Legend: M positions, D hidden width, V vocabulary, K tasks.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

IGNORED = -100


class UnsupportedError(Exception):
    """The peer has no way to compute what is asked; the message says what is missing."""


class Weighting(NamedTuple):
    """Eq. 2: token t weighs ``task_weights_K[task_ids_M[t]]``."""

    task_ids_M: Tensor  # int64
    task_weights_K: Tensor  # float32


class Peer(Protocol):
    """One way to compute the loss. Subclasses import their package inside the methods."""

    name: str  # in tables; unique
    about: str  # how it computes, in a few words
    package: str | None = None  # the distribution that has to be installed; None: torch, or lines of this folder
    materialises: bool = False  # holds the logits of all rows that it computes at once
    skips_ignored: bool = False  # computes supervised rows only
    sums_narrow: bool = False  # sums a gradient block by block in 16 bits, where small parts get lost

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on this device, or None."""
        return missing(self.package)

    def version(self) -> str:
        """Version of the package the numbers belong to."""
        return version(self.package) if self.package else torch.__version__

    def loss(self, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        """Scalar: the mean of the supervised token losses, weighted by task if ``weighting`` is given (Eq. 2)."""
        raise UnsupportedError("has no loss of a linear head")

    def loss_of_logits(self, logits_MV: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        """The same for logits that exist."""
        raise UnsupportedError("has no loss of logits that exist")


def missing(package: str | None) -> str | None:
    """``None`` if the distribution is installed, else what to do about it."""
    try:
        if package:
            version(package)
    except PackageNotFoundError:
        return f"{package} is not installed (bench/peers.txt)"
    return None


def needs_cuda(package: str, module: str, device: torch.device) -> str | None:
    if reason := missing(package):
        return reason
    return import_problem(module) if device.type == "cuda" else "runs on CUDA devices only"


@cache  # a failing import runs again each time, and may take seconds
def import_problem(module: str) -> str | None:
    """Why an installed package cannot be imported: known once, not found again in every case."""
    try:
        import_module(module)
    except Exception as error:  # such packages fail with more than ImportError
        return f"cannot be imported: {type(error).__name__}: {str(error)[:200]} (bench/peers.txt)"
    return None


def weighted_mean(losses_M: Tensor, labels_M: Tensor, weighting: Weighting) -> Tensor:
    """What a user writes around per-token losses to get Eq. 2."""
    weights_M = weighting.task_weights_K[weighting.task_ids_M] * (labels_M != IGNORED)
    return (losses_M.float() * weights_M).sum() / weights_M.sum()
