"""Apple's Cut Cross-Entropy, gradient filter off: on random hidden states the filter would drop the work itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.peers.base import Peer, UnsupportedError, Weighting, missing, needs_cuda, weighted_mean


class CutCrossEntropy(Peer):
    """Its Triton kernels."""

    name = "cut-cross-entropy"
    about = "Triton, logits computed again in backward; gradient filter off"
    package = "cut-cross-entropy"
    skips_ignored = True
    sums_narrow = True
    options: dict[str, Any] = {"impl": "cce", "filter_eps": None}  # noqa: RUF012 - never changed

    def unavailable(self, device: torch.device) -> str | None:
        return needs_cuda("cut-cross-entropy", "cut_cross_entropy", device)

    def loss(self, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        if self.options["impl"] == "cce" and hidden_MD.dtype == torch.float32 and hidden_MD.requires_grad:
            raise UnsupportedError("its backward pass takes 16-bit hidden states only")
        if weighting is None:
            return linear_cross_entropy(hidden_MD, weight_VD, labels_M, **self.options)
        losses_M = linear_cross_entropy(hidden_MD, weight_VD, labels_M, reduction="none", **self.options)
        return weighted_mean(losses_M, labels_M, weighting)


class CutCrossEntropyCompiled(CutCrossEntropy):
    """Its ``torch_compile`` implementation, which runs on a CPU too."""

    name = "cut-cross-entropy (torch_compile)"
    about = "its implementation for other devices: supervised rows, torch.compile"
    materialises = True
    sums_narrow = False
    options: dict[str, Any] = {"impl": "torch_compile"}  # noqa: RUF012

    def unavailable(self, device: torch.device) -> str | None:
        return missing("cut-cross-entropy")
