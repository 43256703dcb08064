"""The ``torch.library`` ops around the loss: targets, scales and sums of tasks; see :mod:`cotbal_kernels.ops`."""

# Shapes: M flattened positions, V vocabulary, K tasks.

from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS
from .interface import Targets
from .per_task import divide_or_zero
from .refusals import refuse_double_backward

# --- memory that callers do not see -----------------------------------------------------------------------


@torch.library.custom_op("cotbal::apart", mutates_args=(), schema="(Tensor sums) -> Tensor")
def apart(sums: Tensor) -> Tensor:
    """A copy of sums that callers see and may add up over ranks in place, before a backward pass that needs them.

    A collective writes without a word to autograd. An op, since a compiler takes ``clone`` out of its graph, or makes
    the copy as late as in the backward pass.
    """
    return sums.clone()


@apart.register_fake
def _(sums: Tensor) -> Tensor:
    return torch.empty_like(sums)


apart.register_autograd(lambda ctx, grad: grad)


# --- targets: validation, counts, which rows are computed -------------------------------------------------


@torch.library.custom_op(
    "cotbal::prepare_targets",
    mutates_args=(),
    schema="(Tensor labels_M, Tensor task_ids_M, Tensor task_weights_K, SymInt vocab_size, int ignore_index, "
    "bool skip_zero, bool check, SymInt capacity, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def prepare_targets(
    labels_M: Tensor,
    task_ids_M: Tensor,
    task_weights_K: Tensor,
    vocab_size: int,
    ignore_index: int,
    skip_zero: bool,
    check: bool,
    capacity: int,
    backend: str,
) -> tuple[Tensor, ...]:
    """Return the fields of :class:`~cotbal_kernels.interface.Targets`."""
    return tuple(
        BACKENDS[backend].prepare_targets(
            labels_M, task_ids_M, task_weights_K, vocab_size, ignore_index, skip_zero, check, capacity
        )
    )


@prepare_targets.register_fake
def _(
    labels_M: Tensor,
    task_ids_M: Tensor,
    task_weights_K: Tensor,
    vocab_size: int,
    ignore_index: int,
    skip_zero: bool,
    check: bool,
    capacity: int,
    backend: str,
) -> tuple[Tensor, ...]:
    return tuple(Targets.empty(labels_M, task_weights_K, capacity))


# --- scales of tasks: lambda over the normalizer ----------------------------------------------------------


@torch.library.custom_op(
    "cotbal::task_scales",
    mutates_args=(),
    schema="(Tensor task_weights_K, Tensor tokens_K, Tensor poison, Tensor? normalizer, bool per_task, str backend) "
    "-> (Tensor, Tensor)",
)
def task_scales(
    task_weights_K: Tensor, tokens_K: Tensor, poison: Tensor, normalizer: Tensor | None, per_task: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Return scale_K, differentiable in lambda and a given normalizer, and the denominator of every task."""
    return BACKENDS[backend].task_scales(task_weights_K, tokens_K, poison, normalizer, per_task)


@task_scales.register_fake
def _(
    task_weights_K: Tensor, tokens_K: Tensor, poison: Tensor, normalizer: Tensor | None, per_task: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return task_weights_K.new_empty(task_weights_K.shape), task_weights_K.new_empty(task_weights_K.shape)


def _task_scales_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, tokens_K, _, normalizer, ctx.per_task, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.given = normalizer is not None
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(*output, apart(tokens_K))  # callers see the counts


def _task_scales_backward(ctx: Any, grad_K: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """With scale = lambda / n: the part of lambda, and that of n, which is made of lambda unless it was given."""
    if grad_K is None:
        return (None,) * 6
    refuse_double_backward("cotbal::task_scales")
    scale_K, denominator_K, tokens_K = ctx.saved_tensors
    grad_weights_K = divide_or_zero(grad_K, denominator_K)
    grad_denominator_K = -grad_weights_K * scale_K
    if ctx.given:
        grad_normalizer = grad_denominator_K if ctx.per_task else grad_denominator_K.sum()
        return grad_weights_K, None, None, grad_normalizer, None, None
    if ctx.per_task:  # n_k = T_k * sum of lambda over the tasks present
        grad_weights_K = grad_weights_K + torch.where(tokens_K > 0, (tokens_K * grad_denominator_K).sum(), 0)
    else:  # n = sum_k lambda_k T_k
        grad_weights_K = grad_weights_K + tokens_K * grad_denominator_K.sum()
    return grad_weights_K, None, None, None, None, None


task_scales.register_autograd(_task_scales_backward, setup_context=_task_scales_setup)


# --- sums of tasks ----------------------------------------------------------------------------------------


@torch.library.custom_op(
    "cotbal::task_sums",
    mutates_args=(),
    schema="(Tensor loss_M, Tensor hit_M, Tensor tasks_M, SymInt num_tasks, str backend) -> (Tensor, Tensor)",
)
def task_sums(loss_M: Tensor, hit_M: Tensor, tasks_M: Tensor, num_tasks: int, backend: str) -> tuple[Tensor, Tensor]:
    """Return losses, differentiable, and hits of every task."""
    return BACKENDS[backend].task_sums(loss_M, hit_M, tasks_M, num_tasks)


@task_sums.register_fake
def _(loss_M: Tensor, hit_M: Tensor, tasks_M: Tensor, num_tasks: int, backend: str) -> tuple[Tensor, Tensor]:
    return loss_M.new_empty(num_tasks), hit_M.new_empty(num_tasks)


def _task_sums_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[2])


def _task_sums_backward(ctx: Any, grad_K: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_K is None:
        return (None,) * 5
    refuse_double_backward("cotbal::task_sums")
    (tasks_M,) = ctx.saved_tensors
    return grad_K.index_select(0, tasks_M), None, None, None, None


task_sums.register_autograd(_task_sums_backward, setup_context=_task_sums_setup)
