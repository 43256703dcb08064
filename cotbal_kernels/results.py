"""What the loss functions return."""

from typing import NamedTuple

from torch import Tensor


class TaskLoss(NamedTuple):
    """Result of :func:`linear_task_cross_entropy` and :func:`task_cross_entropy`; K tasks, ``...`` positions.

    A task whose weight is 0 is skipped unless its loss is asked for (see ``differentiable_tasks``): its
    ``task_loss`` and ``task_correct`` are then 0 while ``task_tokens`` still counts its tokens.
    """

    loss: Tensor  # scalar float32, or [...] with aggregation="none"; differentiable
    task_loss: Tensor  # [K] float32, S_k: sum of the unweighted token losses of each task
    task_tokens: Tensor  # [K] int64, T_k: supervised tokens of each task
    task_correct: Tensor  # [K] int64: tokens whose label is the argmax (the first one among equals)
    lse: Tensor  # [...] float32, log-sum-exp of the logits; 0 where a position was not computed; detached
