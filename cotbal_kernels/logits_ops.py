"""The ``torch.library`` ops of the loss of logits that exist, and its gradient; see :mod:`cotbal_kernels.ops`."""

# Shapes: M flattened positions, V vocabulary.

from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS
from .interface import Spec, TokenLoss
from .ops import fake_rows
from .refusals import refuse_double_backward


@torch.library.custom_op(
    "cotbal::task_ce_rows",
    mutates_args=(),
    schema="(Tensor logits_MV, Tensor targets_M, float[] spec, int chunk_size, str backend, bool inplace_backward) "
    "-> (Tensor, Tensor, Tensor)",
)
def task_ce_rows(
    logits_MV: Tensor,
    targets_M: Tensor,
    spec: Spec,
    chunk_size: int,
    backend: str,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss_M (differentiable for any upstream gradient), hit_M int64 and stats_2M (see the backends)."""
    return BACKENDS[backend].logits_rows_forward(logits_MV, targets_M, TokenLoss(*spec), chunk_size)


@task_ce_rows.register_fake
def _(
    logits_MV: Tensor,
    targets_M: Tensor,
    spec: Spec,
    chunk_size: int,
    backend: str,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_rows(logits_MV, targets_M)


@torch.library.custom_op(
    "cotbal::task_ce_rows_backward",
    mutates_args=(),
    schema="(Tensor grad_M, Tensor logits_MV, Tensor targets_M, Tensor stats_2M, float[] spec, int chunk_size, "
    "str backend) -> Tensor",
)
def task_ce_rows_backward(
    grad_M: Tensor,
    logits_MV: Tensor,
    targets_M: Tensor,
    stats_2M: Tensor,
    spec: Spec,
    chunk_size: int,
    backend: str,
) -> Tensor:
    """Return the gradient of the logits."""
    out_MV = torch.empty_like(logits_MV, memory_format=torch.contiguous_format)
    BACKENDS[backend].logits_rows_backward(grad_M, logits_MV, targets_M, stats_2M, TokenLoss(*spec), chunk_size, out_MV)
    return out_MV


@task_ce_rows_backward.register_fake
def _(
    grad_M: Tensor,
    logits_MV: Tensor,
    targets_M: Tensor,
    stats_2M: Tensor,
    spec: Spec,
    chunk_size: int,
    backend: str,
) -> Tensor:
    return logits_MV.new_empty(logits_MV.shape)


@torch.library.custom_op(
    "cotbal::task_ce_rows_backward_",
    mutates_args=("logits_MV",),
    schema="(Tensor grad_M, Tensor(a!) logits_MV, Tensor targets_M, Tensor stats_2M, float[] spec, int chunk_size, "
    "str backend) -> ()",
)
def task_ce_rows_backward_(
    grad_M: Tensor,
    logits_MV: Tensor,
    targets_M: Tensor,
    stats_2M: Tensor,
    spec: Spec,
    chunk_size: int,
    backend: str,
) -> None:
    """Turn the logits into their gradient."""
    BACKENDS[backend].logits_rows_backward(
        grad_M, logits_MV, targets_M, stats_2M, TokenLoss(*spec), chunk_size, logits_MV
    )


@task_ce_rows_backward_.register_fake
def _(
    grad_M: Tensor,
    logits_MV: Tensor,
    targets_M: Tensor,
    stats_2M: Tensor,
    spec: Spec,
    chunk_size: int,
    backend: str,
) -> None:
    return None


def _logits_rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:2], output[2])
    *ctx.options, ctx.inplace = inputs[2:]


def _logits_rows_backward(ctx: Any, grad_M: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_M is None:
        return (None,) * 6
    refuse_double_backward("cotbal::task_ce_rows")
    logits_MV, *saved = ctx.saved_tensors
    if ctx.inplace:
        # Counted as a change of the logits, so a second backward pass that needs them is an error of autograd.
        task_ce_rows_backward_(grad_M, logits_MV, *saved, *ctx.options)
        return logits_MV.detach(), *(None,) * 5
    return task_ce_rows_backward(grad_M, logits_MV, *saved, *ctx.options), *(None,) * 5


task_ce_rows.register_autograd(_logits_rows_backward, setup_context=_logits_rows_setup)
