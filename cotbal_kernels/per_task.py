"""Sums per task and values per token, without atomics, so that both directions are bitwise reproducible."""

# Shapes: M positions, K tasks.

import torch
from torch import Tensor


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
    out_M = values_K.new_zeros(tasks_M.shape)
    for k in range(values_K.shape[0]):
        out_M = torch.where(tasks_M == k, values_K[k], out_M)
    return out_M
