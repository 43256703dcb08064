"""QuACK's chunked linear cross-entropy (CuTe DSL), and its cross-entropy of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.peers.base import Peer, UnsupportedError, Weighting, needs_cuda, weighted_mean


class Quack(Peer):
    """Chunks of 4096 tokens, its default. Without reduction "none", task weights mean its unchunked function."""

    name = "quack"
    about = "CuTe DSL, gradients in forward, token chunks of 4096; weighted: all logits, reduction none"
    package = "quack-kernels"

    def unavailable(self, device: torch.device) -> str | None:
        return needs_cuda("quack-kernels", "quack.linear_cross_entropy", device)

    def loss(self, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy, linear_cross_entropy_func

        if weighting is None:
            if hidden_MD.dtype == torch.float32 and hidden_MD.requires_grad:
                raise UnsupportedError("its products for the gradients take 16-bit operands only (on Hopper)")
            return chunked_linear_cross_entropy(hidden_MD, weight_VD, labels_M, reduction="mean")
        losses_M = linear_cross_entropy_func(hidden_MD, weight_VD, None, labels_M, reduction="none")
        return weighted_mean(losses_M, labels_M, weighting)

    def loss_of_logits(self, logits_MV: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        from quack.cross_entropy import cross_entropy

        if weighting is None:
            return cross_entropy(logits_MV, labels_M, reduction="mean")
        return weighted_mean(cross_entropy(logits_MV, labels_M, reduction="none"), labels_M, weighting)
