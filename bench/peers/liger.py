"""Liger-Kernel's fused linear cross-entropy, and its cross-entropy of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.peers.base import Peer, Weighting, needs_cuda, weighted_mean


class Liger(Peer):
    """Gradients in forward, chunks of tokens; dW is summed in the dtype of the weight unless told otherwise."""

    name = "liger"
    about = "Triton, token chunks, dW summed in the dtype of weight"
    package = "liger-kernel"
    accum_dtype: torch.dtype | None = None

    def unavailable(self, device: torch.device) -> str | None:
        return needs_cuda("liger-kernel", "liger_kernel.transformers.functional", device)

    def loss(self, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

        if weighting is None:
            return fused(hidden_MD, weight_VD, labels_M, accum_dtype=self.accum_dtype)
        losses_M = fused(hidden_MD, weight_VD, labels_M, reduction="none", accum_dtype=self.accum_dtype)
        return weighted_mean(losses_M, labels_M, weighting)

    def loss_of_logits(self, logits_MV: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        from liger_kernel.transformers.functional import liger_cross_entropy

        # It overwrites the logits with their gradient, and the next round needs them: the copy is part of its time.
        logits_MV = logits_MV.clone()
        if weighting is None:
            return liger_cross_entropy(logits_MV, labels_M)
        return weighted_mean(liger_cross_entropy(logits_MV, labels_M, reduction="none"), labels_M, weighting)


class LigerFloat32(Liger):
    """The same with dW summed in float32. Logits that exist have no dW: one entry there, not two."""

    name = "liger (fp32 dW)"
    about = "Triton, token chunks, dW summed in float32"
    accum_dtype = torch.float32
    loss_of_logits = Peer.loss_of_logits
