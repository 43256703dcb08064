"""torchtune-style chunking: ignored tokens are dropped, the rest goes through head and loss in eight pieces."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers.base import IGNORED, Peer, Weighting

CHUNKS = 8


class TokenChunks(Peer):
    """Written here after the description of ``torchtune.modules.loss.LinearCrossEntropyLoss``, not compiled.

    Autograd keeps the log-probabilities of every piece, so what is saved is the cast of all logits at once.
    """

    name = "token chunks (torchtune-style)"
    about = "supervised tokens only, eight chunks, plain autograd; boolean indexing synchronises"
    materialises = True
    skips_ignored = True

    def loss(self, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        kept_M = labels_M != IGNORED
        hidden_ND, labels_N = hidden_MD[kept_M], labels_M[kept_M]
        if weighting is None:
            weights_N = torch.ones_like(labels_N, dtype=torch.float32)
        else:
            weights_N = weighting.task_weights_K[weighting.task_ids_M[kept_M]]
        pieces = zip(*(tensor.tensor_split(CHUNKS) for tensor in (hidden_ND, labels_N, weights_N)), strict=True)
        total = torch.zeros((), device=hidden_MD.device)
        for hidden_CD, labels_C, weights_C in pieces:
            logits_CV = F.linear(hidden_CD, weight_VD).float()
            total = total + (F.cross_entropy(logits_CV, labels_C, reduction="none") * weights_C).sum()
        return total / weights_N.sum()
