"""Sums and scales per task and values per token, without atomics, so that they are bitwise reproducible."""

# Shapes: M positions, K tasks.

import torch
from torch import Tensor


def task_normalizer(task_weights_K: Tensor, tokens_K: Tensor, aggregation: str) -> Tensor:
    """The denominator of each aggregation: a scalar, ``[K]`` for "task".

    "token": sum_k lambda_k T_k (Eq. 2). "task": T_k * sum of lambda over the tasks present, 0 for an absent
    one.
    """
    if aggregation == "task":
        return tokens_K * torch.where(tokens_K > 0, task_weights_K, 0).sum()
    return (task_weights_K * tokens_K).sum()


def task_scales(
    task_weights_K: Tensor, tokens_K: Tensor, poison: Tensor, normalizer: Tensor | None, per_task: bool
) -> tuple[Tensor, Tensor]:
    """Lambda over the normalizer, 0 where that is 0, and the normalizer of every task; see the protocol of backends."""
    task_weights_K = task_weights_K + poison
    if normalizer is None:
        # Added once more: no task may be present.
        normalizer = task_normalizer(task_weights_K, tokens_K, "task" if per_task else "token") + poison
    right = (normalizer >= 0) & (normalizer < torch.inf)
    denominator_K = torch.where(right, normalizer, torch.nan).expand(task_weights_K.shape).clone()
    return divide_or_zero(task_weights_K, denominator_K), denominator_K


def divide_or_zero(numerator_K: Tensor, denominator_K: Tensor) -> Tensor:
    """``numerator / denominator``, 0 where the denominator is 0."""
    empty_K = denominator_K == 0
    return torch.where(empty_K, 0, numerator_K / torch.where(empty_K, 1, denominator_K))


def task_sums(loss_M: Tensor, hit_M: Tensor, tasks_M: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
    """Losses and hits of every task, ``[K]`` both."""
    correct_K = hit_M.new_zeros(num_tasks).scatter_add_(0, tasks_M, hit_M)  # integers: exact in any order
    return sum_by_task(loss_M, tasks_M, num_tasks), correct_K


def sum_by_task(values_M: Tensor, tasks_M: Tensor, num_tasks: int) -> Tensor:
    """Return ``out[k] = sum of values_M where tasks_M == k`` as ``[K]``, differentiable in ``values_M``.

    ``index_add`` and ``bincount`` with float weights accumulate in an order that depends on threads (CPU) or
    on atomics (CUDA). K masked sums cost K * M reads of a vector, nothing beside a product with the
    vocabulary.
    """
    zero = values_M.new_zeros(())
    return torch.stack([torch.where(tasks_M == k, values_M, zero).sum() for k in range(num_tasks)])


def spread_to_tokens(values_K: Tensor, tasks_M: Tensor) -> Tensor:
    """Return ``values_K[tasks_M]`` as ``[M]``; its gradient is :func:`sum_by_task`, without atomics."""
    if not values_K.requires_grad:
        return values_K[tasks_M]
    out_M = values_K.new_zeros(tasks_M.shape)
    for k in range(values_K.shape[0]):
        out_M = torch.where(tasks_M == k, values_K[k], out_M)
    return out_M
