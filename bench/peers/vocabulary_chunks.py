"""A head of per-token log-probabilities that never holds a row of logits, as TRL's trainer has one.

Legend: M positions, D hidden width, V vocabulary, B vocabulary columns at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.peers.base import IGNORED, Peer, Weighting, weighted_mean

COLUMNS = 8192


class _LogProbabilities(torch.autograd.Function):
    """log p(target) of every row; the backward pass computes the logits again, 1 + 3 products."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
        # -inf to start with: the first block replaces it.
        lse_M = torch.full(targets_M.shape, -torch.inf, device=hidden_MD.device)
        chosen_M = torch.zeros_like(lse_M)
        for start in range(0, weight_VD.shape[0], COLUMNS):
            logits_MB = (hidden_MD @ weight_VD[start : start + COLUMNS].t()).float()
            lse_M = torch.logaddexp(lse_M, logits_MB.logsumexp(1))
            here_M, column_M1 = _columns(targets_M, start, logits_MB.shape[1])
            chosen_M = torch.where(here_M, logits_MB.gather(1, column_M1).squeeze(1), chosen_M)
        ctx.save_for_backward(hidden_MD, weight_VD, targets_M, lse_M)
        return chosen_M - lse_M

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_MD, weight_VD, targets_M, lse_M = ctx.saved_tensors
        (upstream_M,) = gradients
        dtype = hidden_MD.dtype
        grad_hidden_MD = torch.zeros_like(hidden_MD, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        for start in range(0, weight_VD.shape[0], COLUMNS):
            weight_BD = weight_VD[start : start + COLUMNS]
            grad_MB = (hidden_MD @ weight_BD.t()).float().sub_(lse_M[:, None]).exp_()
            here_M, column_M1 = _columns(targets_M, start, grad_MB.shape[1])
            grad_MB.scatter_add_(1, column_M1, -here_M[:, None].float())
            narrow_MB = grad_MB.mul_(-upstream_M[:, None]).to(dtype)
            if grad_hidden_MD is not None:
                grad_hidden_MD += narrow_MB @ weight_BD
            if grad_weight_VD is not None:
                torch.mm(narrow_MB.t(), hidden_MD, out=grad_weight_VD[start : start + COLUMNS])
        return None if grad_hidden_MD is None else grad_hidden_MD.to(dtype), grad_weight_VD, None


def _columns(targets_M: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether the target lies in this block, and a column that may be looked at in any case."""
    local_M = targets_M - start
    return (local_M >= 0) & (local_M < width), local_M.clamp(0, width - 1)[:, None]


class VocabularyChunks(Peer):
    """Written here after the description of TRL's fused head: log-probabilities per token, then any loss of them."""

    name = "vocabulary chunks (TRL-style)"
    about = f"per-token log-probabilities, {COLUMNS} columns at a time, computed again in backward"

    def loss(self, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        losses_M = -_LogProbabilities.apply(hidden_MD, weight_VD, labels_M.clamp(min=0))
        if weighting is None:
            kept_M = labels_M != IGNORED
            return (losses_M * kept_M).sum() / kept_M.sum()
        return weighted_mean(losses_M, labels_M, weighting)
