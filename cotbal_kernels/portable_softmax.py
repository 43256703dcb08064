"""The portable backend's pass over a block of logits: loss and statistics of every row, then the gradient in place."""

# Shapes: B rows of a block, V vocabulary (or the shard of it that the head holds).

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .interface import TokenLoss
from .rows import on_cpu


class Rows(NamedTuple):
    """Loss and statistics of some rows."""

    loss_B: Tensor
    max_B: Tensor
    log_sum_B: Tensor
    hit_B: Tensor


def scale_and_cap(logits_BV: Tensor, spec: TokenLoss) -> None:
    """In place: ``z -> softcap * tanh(scale * z / softcap)``."""
    if spec.softcap:
        logits_BV.div_(spec.softcap / spec.scale).tanh_().mul_(spec.softcap)
    elif spec.scale != 1:
        logits_BV.mul_(spec.scale)


def row_losses(logits_BV: Tensor, probs_BV: Tensor, targets_B: Tensor, spec: TokenLoss) -> Rows:
    """The loss is ``log l - (z - m)``, both small, never ``(m + log l) - z``: a large offset m eats the digits."""
    target_B = logits_BV.gather(1, targets_B.clamp(min=0)[:, None]).squeeze(1)
    max_B, hit_B = _largest_and_hits(logits_BV, targets_B, target_B)
    log_sum_B = -probs_BV.amax(1).log()  # the largest probability is exp(0) / l
    at_target_B = target_B - max_B
    loss_B = log_sum_B - (1 - spec.smoothing) * at_target_B.masked_fill(targets_B < 0, 0)
    if spec.even:
        loss_B = loss_B - spec.even * (logits_BV - max_B[:, None]).sum(1)
    if spec.z_loss:
        loss_B = loss_B + spec.z_loss * (max_B + log_sum_B) ** 2
    return Rows(loss_B, max_B, log_sum_B, hit_B)


def _largest_and_hits(logits_BV: Tensor, targets_B: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of every row, and whether the first of that size is the target's.

    On a CPU an argmax takes as long as the softmax, a maximum a tenth of it: so that of all the others, and the
    argmax only where the target equals it.
    """
    if not on_cpu(logits_BV):
        max_B, argmax_B = logits_BV.max(dim=1)
        return max_B, argmax_B == targets_B
    index_B1 = targets_B.clamp(min=0)[:, None]
    logits_BV.scatter_(1, index_B1, -math.inf)
    others_B = logits_BV.amax(1)
    logits_BV.scatter_(1, index_B1, target_B[:, None])
    hit_B = target_B > others_B
    tied = (target_B == others_B).nonzero().squeeze(1)
    hit_B[tied] = logits_BV[tied].argmax(1) == index_B1[tied, 0]
    return torch.maximum(target_B, others_B), hit_B & (targets_B >= 0)


def logits_to_gradient(
    logits_BV: Tensor, probs_BV: Tensor, targets_B: Tensor, scale_B: Tensor, lse_B: Tensor, spec: TokenLoss
) -> None:
    """Overwrite the logits, scaled and capped, with ``scale * d loss / d (raw logits)``, all in float32.

    ``p - 1`` at the target is formed before any rounding to 16 bits and before the scale.
    """
    scale_B = scale_B * spec.scale  # the slope of the scaling, the same everywhere
    factor_B = 1 + 2 * spec.z_loss * lse_B
    index_B1 = targets_B.clamp(min=0)[:, None]
    share_B1 = (targets_B >= 0).to(probs_BV.dtype)[:, None] * (1 - spec.smoothing)
    target_B1 = (probs_BV.gather(1, index_B1) * factor_B[:, None] - share_B1 - spec.even) * scale_B[:, None]
    if spec.softcap:
        slope_BV = 1 - (logits_BV / spec.softcap) ** 2
    torch.mul(probs_BV, (factor_B * scale_B)[:, None], out=logits_BV)
    if spec.even:
        logits_BV.sub_((spec.even * scale_B)[:, None])
    logits_BV.scatter_(1, index_B1, target_B1)
    if spec.softcap:
        logits_BV.mul_(slope_BV)
