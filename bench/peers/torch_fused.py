"""``torch.nn.functional.linear_cross_entropy``, which exists since torch 2.13."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers.base import Peer, Weighting, weighted_mean


class TorchFused(Peer):
    """Its reference path."""

    name = "torch linear_cross_entropy"
    about = "torch.nn.functional.linear_cross_entropy, options=None"
    materialises = True

    def unavailable(self, device: torch.device) -> str | None:
        if hasattr(F, "linear_cross_entropy"):
            return None
        return f"torch {torch.__version__} has no linear_cross_entropy (2.13 and newer have)"

    def options(self) -> dict[str, Any]:
        return {}

    def loss(self, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        if weighting is None:
            return F.linear_cross_entropy(hidden_MD, weight_VD, labels_M, **self.options())
        losses_M = F.linear_cross_entropy(hidden_MD, weight_VD, labels_M, reduction="none", **self.options())
        return weighted_mean(losses_M, labels_M, weighting)


class TorchChunked(TorchFused):
    """Its chunked path with every choice left to PyTorch."""

    name = "torch linear_cross_entropy (chunked)"
    about = "torch.nn.functional.linear_cross_entropy, options=LinearCrossEntropyOptions()"
    materialises = False

    def options(self) -> dict[str, Any]:
        return {"options": torch.nn.LinearCrossEntropyOptions()}
