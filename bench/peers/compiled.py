"""``torch.compile`` of the materialised path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers.base import Peer, Weighting
from bench.peers.eager import cross_entropy


def _linear_loss(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
    return cross_entropy(F.linear(hidden_MD, weight_VD), labels_M, weighting)


class Compiled(Peer):
    """Compiled once for all sizes (``dynamic=True``), as training on sequences of varying length needs it."""

    name = "torch.compile"
    about = "torch.compile(dynamic=True) of eager"
    materialises = True

    def __init__(self) -> None:
        # One graph per dtype, mode and weighting; beyond the limit dynamo would silently go back to eager.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self._loss = torch.compile(_linear_loss, dynamic=True, fullgraph=True)
        self._of_logits = torch.compile(cross_entropy, dynamic=True, fullgraph=True)

    def loss(self, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        return self._loss(hidden_MD, weight_VD, labels_M, weighting)

    def loss_of_logits(self, logits_MV: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        return self._of_logits(logits_MV, labels_M, weighting)
