"""The materialised path: what a transformers causal model does when it is given labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bench.peers.base import Peer, Weighting, weighted_mean


def cross_entropy(logits_MV: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
    """All logits in float32, then PyTorch's cross-entropy."""
    if weighting is None:
        return F.cross_entropy(logits_MV.float(), labels_M)
    return weighted_mean(F.cross_entropy(logits_MV.float(), labels_M, reduction="none"), labels_M, weighting)


class Eager(Peer):
    """Logits of every position, cast to float32, cross-entropy."""

    name = "eager"
    about = "transformers' default: all logits, cast to float32"
    materialises = True

    def loss(self, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        return cross_entropy(F.linear(hidden_MD, weight_VD), labels_M, weighting)

    def loss_of_logits(self, logits_MV: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        return cross_entropy(logits_MV, labels_M, weighting)
