"""Per-task losses and head gradients around a step: forward passes without a graph, sums over ranks.

Shapes: K tasks, M supervised rows, D hidden width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from cotbal_kernels.gradient_norms import HeadRows, head_gradient_norms, supervised_rows
from cotbal_kernels.huggingface import set_task_weights
from trainer.balancing.method import TaskLosses, onto


class HeadTap:
    """Keeps what reaches the model's head with labels, supervised rows only (M x D numbers), while it is open."""

    def __init__(self, model: Any, num_tasks: int) -> None:
        self._head: Any = model.get_output_embeddings()
        self._num_tasks = num_tasks
        self._rows: list[HeadRows] | None = None
        self._head.register_forward_hook(self._keep, with_kwargs=True)

    def open(self) -> None:
        """Starts keeping, from nothing."""
        self._rows = []

    def norms(self) -> Tensor:
        """Closes the tap; returns the norm of d S_k / d head.weight ``[K]`` over all that was kept on all ranks."""
        assert self._rows is not None, "open the tap first"
        rows, self._rows = self._rows, None
        scaling, bias = self._head.fused.scaling, self._head.bias
        # s (x W^T + b) is the product of s x, and has its gradient.
        rows = [row._replace(hidden=row.hidden * scaling.scale) for row in rows]
        with _whole(self._head):
            return head_gradient_norms(
                rows,
                scaling.kept(self._head.weight),
                self._num_tasks,
                bias=None if bias is None else scaling.kept(bias) * scaling.scale,
                logit_softcap=scaling.softcap,
            )

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        labels = kwargs.get("labels")
        if self._rows is None or labels is None:
            return
        hidden, lse = args[0], output[4]  # TaskLoss.lse
        labels, task_ids = labels.to(hidden.device), kwargs["task_ids"].to(hidden.device)
        self._rows.append(supervised_rows(hidden, lse, labels, task_ids, shift=True))


@contextlib.contextmanager
def _whole(head: nn.Linear) -> Iterator[None]:
    """The head's parameters whole on every rank, whatever ZeRO stage."""
    if not hasattr(head.weight, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([p for p in (head.weight, head.bias) if p is not None]):
        yield


def forward_only(
    trainer: Trainer, batches: Iterable[dict[str, Any]], num_tasks: int, tap: HeadTap | None = None
) -> TaskLosses:
    """Losses ``[K]`` on `batches` over all ranks, in evaluation mode and without a graph.

    Leaves the random state and the model's mode as they were. Every rank must call with as many batches. With `tap`,
    the head's gradient norms come along. Leaves the model's task weights at 1, since the fused loss skips a task of
    weight 0; every step sets its own.
    """
    model: Any = trainer.model_wrapped
    own: Any = trainer.model
    device = trainer.args.device
    set_task_weights(own, torch.ones(num_tasks, device=device))
    training = model.training
    model.eval()
    sums = torch.zeros(2, num_tasks, dtype=torch.float64, device=device)
    if tap is not None:
        tap.open()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for batch in batches:
            moved = {name: onto(value, device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            outputs = model(**trainer._prepare_inputs(moved))
            sums += torch.stack([outputs["task_loss"], outputs["task_tokens"]])
    norms = tap.norms() if tap is not None else None
    model.train(training)
    return summed(sums, norms)


def summed(sums: Tensor, norms: Tensor | None = None) -> TaskLosses:
    """Sums of this rank ``[2, K]`` as losses over all ranks; `norms` are of S_k and become those of L_k."""
    sums = sums.clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    loss_sum, tokens = sums
    return TaskLosses(loss_sum, tokens, None if norms is None else norms / tokens.clamp(min=1))
