"""The ``torch.library`` ops of a linear head's loss and its gradients: schemas, fake kernels, autograd.

Those on logits that exist are in :mod:`cotbal_kernels.logits_ops`, on targets and tasks in
:mod:`cotbal_kernels.task_ops`.

Every op has static output shapes and works on flattened positions, so ``torch.compile(fullgraph=True)`` and
CUDA graphs see through it. What computes is a backend of :mod:`cotbal_kernels.backends`, found by name when
the op runs.

No op has a second derivative: ``create_graph=True`` raises instead of returning one that is silently
incomplete.
"""

# Shapes: M flattened positions, D hidden width, V vocabulary, K tasks.

from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS
from .interface import LinearProblem, Need, Spec, TokenLoss, compute_dtype, saved_grad_dtypes
from .refusals import refuse_batched_backward, refuse_double_backward
from .task_ops import apart

# --- loss of a linear head, gradients in forward ----------------------------------------------------------


@torch.library.custom_op(
    "cotbal::linear_task_ce",
    mutates_args=(),
    schema="(Tensor hidden_MD, Tensor weight_VD, Tensor? bias_V, Tensor targets_M, Tensor tasks_M, "
    "Tensor rows_N, Tensor num_rows, Tensor scale_K, bool[] need, float[] spec, int chunk_size, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_task_ce(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_M: Tensor,
    tasks_M: Tensor,
    rows_N: Tensor,
    num_rows: Tensor,
    scale_K: Tensor,
    need: Need,
    spec: Spec,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, ...]:
    """Return loss, task_loss_K, task_correct_K, lse_M, dX, dW, db; only the loss is differentiable."""
    with torch.autocast(hidden_MD.device.type, enabled=False):
        return tuple(
            BACKENDS[backend].linear_forward(
                LinearProblem(hidden_MD, weight_VD, bias_V, targets_M, rows_N, num_rows),
                tasks_M,
                scale_K,
                need,
                TokenLoss(*spec),
                chunk_size,
            )
        )


@linear_task_ce.register_fake
def _(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_M: Tensor,
    tasks_M: Tensor,
    rows_N: Tensor,
    num_rows: Tensor,
    scale_K: Tensor,
    need: Need,
    spec: Spec,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, ...]:
    wide, saved = compute_dtype(hidden_MD.dtype), saved_grad_dtypes(hidden_MD.dtype)
    return (
        scale_K.new_empty((), dtype=wide),
        scale_K.new_empty(scale_K.shape, dtype=wide),
        scale_K.new_empty(scale_K.shape, dtype=torch.int64),
        hidden_MD.new_empty(targets_M.shape, dtype=wide),
        hidden_MD.new_empty(hidden_MD.shape if need[0] else (0,), dtype=saved[0]),
        weight_VD.new_empty(weight_VD.shape if need[1] else (0,), dtype=saved[1]),
        weight_VD.new_empty(weight_VD.shape[:1] if need[2] else (0,), dtype=saved[2]),
    )


def _linear_task_ce_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, task_loss_K, _, _, *gradients = output
    ctx.set_materialize_grads(False)  # else autograd makes zeros as large as dW for the unused output dW
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(apart(task_loss_K) if ctx.needs_input_grad[7] else None, *gradients)
    ctx.need, ctx.backend = inputs[8], inputs[11]
    ctx.dtype = inputs[0].dtype


def _linear_task_ce_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 12
    refuse_double_backward("cotbal::linear_task_ce")
    refuse_batched_backward("cotbal::linear_task_ce", grad_loss)
    task_loss_K, *gradients = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] and need for i, need in enumerate(ctx.need)]
    grad_hidden, grad_weight, grad_bias = (
        _scaled(saved, grad_loss, ctx.dtype, ctx.backend) if want else None
        for saved, want in zip(gradients, wanted, strict=True)
    )
    # scale_K is float32 also in a float64 gradient check
    grad_scale = (grad_loss * task_loss_K).to(torch.float32) if ctx.needs_input_grad[7] else None
    return grad_hidden, grad_weight, grad_bias, *(None,) * 4, grad_scale, *(None,) * 4


linear_task_ce.register_autograd(_linear_task_ce_backward, setup_context=_linear_task_ce_setup)


def _scaled(saved: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """The gradient that waited, times the upstream one: in its own memory if nobody can ask for it again.

    A second V x D beside dW would be as large as everything else together. ``loss.backward()`` has the factor 1
    and touches nothing; under ``retain_graph=True`` what waits must stay as it is.
    """
    plain = type(saved) is Tensor  # a compiler, which traces with tensors of its own, plans the memory itself
    if plain and saved.dtype == dtype and not torch._C._autograd._get_current_graph_task_keep_graph():
        scale_gradient_(saved, factor, backend)
        return saved
    return scale_gradient(saved, factor, dtype, backend)


@torch.library.custom_op(
    "cotbal::scale_gradient",
    mutates_args=(),
    schema="(Tensor grad, Tensor factor, ScalarType dtype, str backend) -> Tensor",
)
def scale_gradient(grad: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Return ``grad * factor`` in ``dtype``, the product in float32."""
    out = torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)
    BACKENDS[backend].scale_gradient(grad.contiguous(), factor, out)
    return out


@scale_gradient.register_fake
def _(grad: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)


@torch.library.custom_op(
    "cotbal::scale_gradient_", mutates_args=("grad",), schema="(Tensor(a!) grad, Tensor factor, str backend) -> ()"
)
def scale_gradient_(grad: Tensor, factor: Tensor, backend: str) -> None:
    """``grad *= factor`` of a contiguous gradient, the product in float32; nothing is touched where it is 1."""
    BACKENDS[backend].scale_gradient(grad, factor, grad)


@scale_gradient_.register_fake
def _(grad: Tensor, factor: Tensor, backend: str) -> None:
    return None


# --- loss per row of a linear head, recomputed in backward ------------------------------------------------


@torch.library.custom_op(
    "cotbal::linear_task_ce_rows",
    mutates_args=(),
    schema="(Tensor hidden_MD, Tensor weight_VD, Tensor? bias_V, Tensor targets_M, Tensor rows_N, Tensor num_rows, "
    "Tensor? grad_weight_out, float[] spec, int chunk_size, str backend) -> (Tensor, Tensor, Tensor)",
)
def linear_task_ce_rows(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_M: Tensor,
    rows_N: Tensor,
    num_rows: Tensor,
    grad_weight_out: Tensor | None,
    spec: Spec,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss_M (differentiable for any upstream gradient), hit_M int64 and stats_2M (see the backends).

    The backward pass adds the gradient of the weight to ``grad_weight_out`` if that is given.
    """
    with torch.autocast(hidden_MD.device.type, enabled=False):
        problem = LinearProblem(hidden_MD, weight_VD, bias_V, targets_M, rows_N, num_rows)
        return BACKENDS[backend].linear_rows_forward(problem, TokenLoss(*spec), chunk_size)


@linear_task_ce_rows.register_fake
def _(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_M: Tensor,
    rows_N: Tensor,
    num_rows: Tensor,
    grad_weight_out: Tensor | None,
    spec: Spec,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_rows(hidden_MD, targets_M)


def fake_rows(scores: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Results of rows without values: loss_M, hit_M and stats_2M."""
    wide = compute_dtype(scores.dtype)
    loss_M = scores.new_empty(targets_M.shape, dtype=wide)
    return loss_M, targets_M.new_empty(targets_M.shape), scores.new_empty((2, *targets_M.shape), dtype=wide)


@torch.library.custom_op(
    "cotbal::linear_task_ce_rows_backward",
    mutates_args=("grad_weight_out",),
    schema="(Tensor grad_M, Tensor hidden_MD, Tensor weight_VD, Tensor? bias_V, Tensor targets_M, Tensor rows_N, "
    "Tensor num_rows, Tensor stats_2M, Tensor(a!)? grad_weight_out, bool[] need, float[] spec, int chunk_size, "
    "str backend, ScalarType grad_hidden_dtype) -> (Tensor, Tensor, Tensor)",
)
def linear_task_ce_rows_backward(
    grad_M: Tensor,
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_M: Tensor,
    rows_N: Tensor,
    num_rows: Tensor,
    stats_2M: Tensor,
    grad_weight_out: Tensor | None,
    need: Need,
    spec: Spec,
    chunk_size: int,
    backend: str,
    grad_hidden_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dX, dW, db, empty where not needed; dW is empty too where it went into ``grad_weight_out``."""
    with torch.autocast(hidden_MD.device.type, enabled=False):
        return BACKENDS[backend].linear_rows_backward(
            LinearProblem(hidden_MD, weight_VD, bias_V, targets_M, rows_N, num_rows),
            grad_M,
            stats_2M,
            grad_weight_out,
            need,
            TokenLoss(*spec),
            chunk_size,
            grad_hidden_dtype,
        )


@linear_task_ce_rows_backward.register_fake
def _(
    grad_M: Tensor,
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_M: Tensor,
    rows_N: Tensor,
    num_rows: Tensor,
    stats_2M: Tensor,
    grad_weight_out: Tensor | None,
    need: Need,
    spec: Spec,
    chunk_size: int,
    backend: str,
    grad_hidden_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden_MD.new_empty(hidden_MD.shape if need[0] else (0,), dtype=grad_hidden_dtype),
        weight_VD.new_empty(weight_VD.shape if need[1] and grad_weight_out is None else (0,)),
        weight_VD.new_empty(weight_VD.shape[:1] if need[2] else (0,)),
    )


def _linear_rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:6], output[2])
    ctx.grad_weight_out, *ctx.options = inputs[6:]  # not saved: it is meant to change before the backward pass


def _linear_rows_backward(ctx: Any, grad_M: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_M is None:
        return (None,) * 10
    refuse_double_backward("cotbal::linear_task_ce_rows")
    refuse_batched_backward("cotbal::linear_task_ce_rows", grad_M)
    need = list(ctx.needs_input_grad[:3])
    hidden_MD, *saved = ctx.saved_tensors
    gradients = linear_task_ce_rows_backward(
        grad_M, hidden_MD, *saved, ctx.grad_weight_out, need, *ctx.options, hidden_MD.dtype
    )
    need[1] = need[1] and ctx.grad_weight_out is None
    wanted = (gradient if want else None for gradient, want in zip(gradients, need, strict=True))
    return *wanted, *(None,) * 7


linear_task_ce_rows.register_autograd(_linear_rows_backward, setup_context=_linear_rows_setup)
