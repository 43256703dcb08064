"""The row ops on a shard of a vocabulary: targets elsewhere, statistics of the whole, dX that is still to be summed."""

import pytest
import torch
from loss_problems import FP32, error, make_problem

from cotbal_kernels import ops, portable
from cotbal_kernels.interface import TokenLoss
from cotbal_kernels.reference import reference_linear_task_cross_entropy

OPTIONS = [
    {},
    {"logit_scale": 0.3},
    {"label_smoothing": 0.2, "z_loss": 0.02},
    {"logit_softcap": 2.0, "label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 1.7},
]
SHARDS = [(0, 29), (29, 30), (30, 67)]


def token_loss(V: int, logit_softcap=0.0, label_smoothing=0.0, z_loss=0.0, logit_scale=1.0) -> TokenLoss:
    return TokenLoss(logit_softcap, label_smoothing, z_loss, logit_scale, even=label_smoothing / V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_row_ops_on_shards(dtype: torch.dtype, options: dict) -> None:
    """Losses by the formula of ``TokenLoss``; gradients of the shards are those of the float64 reference."""
    p = make_problem(dtype=dtype, sharpness=2.0)
    M, V = p.labels.numel(), 67
    fp = 1e-13 if dtype == torch.float64 else FP32
    spec = token_loss(V, **options)
    labels = p.labels.flatten()
    computed = labels >= 0
    ones, zeros = torch.ones(1), torch.zeros(M, dtype=torch.int64)
    targets = portable.prepare_targets(labels, zeros, ones, V, -100, True, False, M)
    grad_M = torch.linspace(-1, 2, M, dtype=torch.float64).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )

    wide = [t.detach().double().requires_grad_() for t in (p.hidden.flatten(0, 1), p.weight, p.bias)]
    whole = reference_linear_task_cross_entropy(
        wide[0], wide[1], labels, zeros, ones, bias=wide[2], aggregation="none", **options
    )
    wanted = torch.autograd.grad(whole.loss, wide, grad_M.double())

    with torch.no_grad():
        z_MV = spec.scale * (wide[0] @ wide[1].t() + wide[2])
        if spec.softcap:
            z_MV = spec.softcap * torch.tanh(z_MV / spec.softcap)
        exact_stats = torch.stack([z_MV.amax(1), (z_MV - z_MV.amax(1, keepdim=True)).logsumexp(1)])
    stats = (exact_stats * computed).to(grad_M.dtype)
    hidden = p.hidden.detach().flatten(0, 1)
    sum_hidden = torch.zeros_like(wide[0])
    for start, stop in SHARDS:
        weight, bias = p.weight.detach()[start:stop], p.bias.detach()[start:stop]
        inside = (labels >= start) & (labels < stop)
        local = torch.where(inside, labels - start, -1)
        arguments = (hidden, weight, bias, local, targets.rows_N, targets.num_rows)
        loss, hit, shard_stats = ops.linear_task_ce_rows(*arguments, None, spec._replace(z_loss=0.0), 7, "portable")
        z = z_MV[:, start:stop]
        m = z.amax(1)
        at_target = torch.where(inside, z.gather(1, local.clamp(min=0)[:, None])[:, 0] - m, 0)
        below = (z - m[:, None]).sum(1)
        log_sum = (z - m[:, None]).logsumexp(1)
        expected = (log_sum - (1 - spec.smoothing) * at_target - spec.even * below) * computed
        assert error(loss, expected) <= fp
        assert error(shard_stats, torch.stack([m, log_sum]) * computed) <= fp
        assert torch.equal(hit == 1, inside & (z.argmax(1) == local))

        for grad_hidden_dtype in {dtype, grad_M.dtype}:
            dX, dW, db = ops.linear_task_ce_rows_backward(
                grad_M, *arguments, stats, None, (True,) * 3, spec, 7, "portable", grad_hidden_dtype
            )
            assert dX.dtype == grad_hidden_dtype
            assert dW.dtype == db.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0.0
        for actual, exact in ((dW, wanted[1]), (db, wanted[2])):
            scale = float(exact.abs().max())  # of the whole: a shard may hold small entries only
            assert float((actual - exact[start:stop]).abs().max()) <= (rounding + fp) * scale
        sum_hidden += ops.linear_task_ce_rows_backward(
            grad_M, *arguments, stats, None, (True, False, False), spec, 7, "portable", grad_M.dtype
        )[0]
    assert error(sum_hidden, wanted[0]) <= fp  # bfloat16 too: nothing was rounded before the sum
