"""A head cut into shards of the vocabulary, through a backend's functions for rows: what combines to the whole loss.

Used for every GPU backend, in the interpreter, on the CPU build of csrc/ and on a device. The oracle is autograd in
float64 on logits that exist.
"""

# Shapes: M positions, D hidden width, V vocabulary, S shards.

from itertools import pairwise
from typing import Any

import torch
from loss_problems import Problem, error
from torch import Tensor

from cotbal_kernels.interface import LinearProblem, TokenLoss

BOUNDS = (0, 37, 38, 150)  # ragged: 37 columns, one, and 112


def scaled_and_capped(z: Tensor, spec: TokenLoss) -> Tensor:
    z = spec.scale * z
    return spec.softcap * torch.tanh(z / spec.softcap) if spec.softcap else z


def exact(p: Problem, spec: TokenLoss, grad_M: Tensor, with_bias: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, losses of the supervised positions (0 elsewhere) and gradients, in float64."""
    leaves = [p.hidden.flatten(0, 1), p.weight, p.bias][: 2 + with_bias]
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    z = leaves[0] @ leaves[1].t() + (leaves[2] if with_bias else 0)
    z = scaled_and_capped(z, spec)
    log_p, labels_M = z.log_softmax(1), p.labels.flatten()
    loss_M = -(1 - spec.smoothing) * log_p.gather(1, labels_M.clamp(min=0)[:, None])[:, 0]
    loss_M = loss_M - spec.smoothing * log_p.mean(1) + spec.z_loss * z.logsumexp(1) ** 2
    loss_M = torch.where(labels_M >= 0, loss_M, 0)
    upstream_M = torch.where(labels_M >= 0, grad_M, 0).double()
    return z.detach(), loss_M.detach(), list(torch.autograd.grad((loss_M * upstream_M).sum(), leaves))


def combined(
    losses_SM: list[Tensor], stats: list[Tensor], has_SM: list[Tensor], spec: TokenLoss, bounds: tuple[int, ...]
) -> Tensor:
    """The loss of the whole vocabulary from those of its shards, by the formula of ``TokenLoss``, in float64."""
    stats_S2M = torch.stack(stats).double()
    max_M = stats_S2M[:, 0].amax(0)
    log_sum_M = ((stats_S2M[:, 0] - max_M) + stats_S2M[:, 1]).logsumexp(0)
    total_M = log_sum_M + spec.z_loss * (max_M + log_sum_M) ** 2
    shards = zip(losses_SM, stats_S2M, has_SM, pairwise(bounds), strict=True)
    for loss_M, (shard_max_M, shard_log_sum_M), has_M, (start, stop) in shards:
        own_M = loss_M - shard_log_sum_M - spec.z_loss * (shard_max_M + shard_log_sum_M) ** 2
        moved_M = (1 - spec.smoothing) * has_M + spec.even * (stop - start)
        total_M = total_M + own_M + moved_M * (max_M - shard_max_M)
    return total_M


def check_shards(
    backend: Any,
    p: Problem,
    options: dict[str, float],
    *,
    with_bias: bool,
    chunk_size: int,
    rounding: float,
    bounds: tuple[int, ...] = BOUNDS,
    fp32: float = 3e-6,
) -> None:
    """Losses and gradients of three shards add up to those of the head, and each shard's dW is its part of dW.

    ``rounding`` is half a unit in the last place of the inputs' dtype, 0 for float32; ``fp32`` what float32 sums may
    be off by, relative to the largest result: loss_problems.FP32 and a half, for three shards.
    """
    hidden_MD, labels_M = p.hidden.detach().flatten(0, 1), p.labels.flatten()
    M, device, dtype = labels_M.shape[0], labels_M.device, hidden_MD.dtype
    computed_M = labels_M >= 0
    rows = torch.nonzero(computed_M)[:, 0]
    rows_N = torch.full((M,), M, device=device).index_copy_(0, torch.arange(len(rows), device=device), rows)
    num_rows = torch.tensor([len(rows)], device=device)
    spec = TokenLoss(**options, even=options.get("smoothing", 0.0) / bounds[-1])
    # Elsewhere it is never looked at, nor where float16 gradients are lifted by the largest.
    grad_M = torch.linspace(-1, 2, M, device=device)
    grad_M = grad_M.masked_fill(~computed_M, 1e30 if dtype == torch.float16 else float("nan"))
    z_MV, loss_M, (exact_X, exact_W, *exact_b) = exact(p, spec, grad_M, with_bias)

    shards, losses, stats, has = [], [], [], []
    for start, stop in pairwise(bounds):
        inside_M = (labels_M >= start) & (labels_M < stop)
        head = (p.weight.detach()[start:stop], p.bias.detach()[start:stop] if with_bias else None)
        where = (torch.where(inside_M, labels_M - start, -1), rows_N, num_rows)
        shards.append(LinearProblem(hidden_MD, *head, *where))
        loss, hit, shard_stats = backend.linear_rows_forward(shards[-1], spec, chunk_size)
        z = z_MV[:, start:stop]
        here = torch.stack([z.amax(1), (z - z.amax(1, keepdim=True)).logsumexp(1)]) * computed_M
        assert error(shard_stats, here) <= fp32
        assert hit.tolist() == (inside_M & (z.argmax(1) + start == labels_M)).long().tolist()
        assert bool((loss[~computed_M] == 0).all())
        losses.append(loss)
        stats.append(shard_stats)
        has.append(inside_M)
    assert error(torch.where(computed_M, combined(losses, stats, has, spec, bounds), 0), loss_M) <= fp32

    lse_M = z_MV.logsumexp(1)
    whole_2M = (torch.stack([z_MV.amax(1), lse_M - z_MV.amax(1)]) * computed_M).float()
    end, every = (spec, chunk_size), (True, True, with_bias)
    sum_X = torch.zeros_like(exact_X)
    for shard, (start, stop) in zip(shards, pairwise(bounds), strict=True):
        dX, dW, db = backend.linear_rows_backward(shard, grad_M, whole_2M, None, every, *end, torch.float32)
        assert (dX.dtype, dW.dtype, db.dtype) == (torch.float32, dtype, dtype)
        sum_X += dX
        for found, wanted in ((dW, exact_W), *((db, b) for b in exact_b)):
            # The gradient of the logits is rounded, and then the result: relative to the whole, not to a small part.
            assert float((found - wanted[start:stop]).abs().max()) <= (2 * rounding + fp32) * float(wanted.abs().max())
    # Of dX only the gradient of the logits has been rounded.
    assert error(sum_X, exact_X) <= rounding + fp32
    narrow = backend.linear_rows_backward(shard, grad_M, whole_2M, None, every, *end, dtype)[0]
    assert torch.equal(narrow, dX.to(dtype))
    assert rounding == 0 or not torch.equal(narrow.float(), dX)

    # A shard far below the largest logit, which is elsewhere: nothing is left of it, and nothing is NaN.
    nowhere = shard._replace(targets_M=torch.full_like(labels_M, -1))
    plain = spec._replace(smoothing=0.0, even=0.0)
    far_2M = whole_2M + torch.tensor([[500.0], [0.0]], device=device)
    far = backend.linear_rows_backward(nowhere, grad_M, far_2M, None, every, plain, chunk_size, torch.float32)
    assert all(bool((gradient == 0).all()) for gradient in far)
