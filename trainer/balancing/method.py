"""What a balancing method sees and what it returns.

A method is told what happened (:meth:`BalancingMethod.before_step`, :meth:`~BalancingMethod.after_step`,
:meth:`~BalancingMethod.validated`) and keeps ``weights`` up to date. Everything it is told is summed over all ranks and
micro-batches first, so every rank computes the same weights without talking to the others.

Shapes: N balanced tasks, in the order of the run's tasks. Auxiliary tasks weigh 1 and no method sees them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.options import Options

# How per-token losses become one number; S_i is a task's sum of cross-entropies, T_i its tokens, L_i = S_i / T_i, all
# over the whole optimizer step.
#   token     sum_i lambda_i S_i / sum_i lambda_i T_i            Eq. 2 of CoTBal
#   task      sum_i lambda_i L_i / sum of lambda over present    TLA: absent tasks are left out
#   task_sum  sum_i lambda_i L_i / sum of all lambda             sum_i w_i L_i with fixed w: Eq. 1 of CoBa
Aggregation = Literal["token", "task", "task_sum"]

# A weight of exactly 0 makes the fused loss skip the task, which would hide its loss from the method.
SMALLEST_WEIGHT = 1e-8


class MethodOptions(Options):
    """Options that every method has."""

    aggregation: Aggregation = Field("token", description="token: Eq. 2; task: TLA; task_sum: sum of w_i L_i")


class TaskSumOptions(MethodOptions):
    """Options of the methods that are defined as ``sum_i w_i L_i`` (Eq. 1 of CoBa)."""

    aggregation: Aggregation = Field("task_sum", description="token: Eq. 2; task: TLA; task_sum: sum of w_i L_i")


@dataclass(frozen=True)
class Needs:
    """What a method asks for beyond being called; what nobody asks for is not computed.

    Attributes:
        losses: training losses of every step (one all-reduce of 2 N numbers).
        losses_before: losses of the step's own batch before the step (one forward pass over it).
        losses_after: losses of the same batch after the step (one forward pass over it).
        gradient_norms: norms of the head's gradient on the training batch.
        validation: validation losses, at step 0 and after every ``balancing.validation.interval`` steps.
        initial: losses of many validation records of each task before the first step (``INITIAL_RECORDS`` of
            ``trainer.loop.validation``), for L_i(0).
        validation_again: the previous validation batch once more, before the new one.
        validation_gradient_norms: norms of the head's gradient on the validation batch.
    """

    losses: bool = False
    losses_before: bool = False
    losses_after: bool = False
    gradient_norms: bool = False
    validation: bool = False
    initial: bool = False
    validation_again: bool = False
    validation_gradient_norms: bool = False


@dataclass(frozen=True)
class TaskLosses:
    """Cross-entropy of every task on one batch, over all ranks and micro-batches.

    Attributes:
        loss_sum: ``[N]`` float64, S_i.
        tokens: ``[N]`` float64, T_i.
        gradient_norms: ``[N]`` float64, norm of d L_i / d lm_head.weight; None when not asked for.
    """

    loss_sum: Tensor
    tokens: Tensor
    gradient_norms: Tensor | None = None

    @property
    def present(self) -> Tensor:
        """``[N]`` bool: the task has a supervised token in this batch."""
        return self.tokens > 0

    @property
    def mean(self) -> Tensor:
        """``[N]`` float64, L_i = S_i / T_i; 0 for an absent task."""
        return self.loss_sum / self.tokens.clamp(min=1)


@dataclass(frozen=True)
class StepReport:
    """One finished optimizer step.

    Attributes:
        step: steps finished so far; 1 after the first.
        epoch: passes over the data so far, a whole number at the end of each.
        losses: of the training batch, under the parameters before the step.
        losses_after: of the same batch under the new parameters, when asked for.
    """

    step: int
    epoch: float
    losses: TaskLosses
    losses_after: TaskLosses | None = None


@dataclass(frozen=True)
class MethodContext:
    """What a method is made for.

    Attributes:
        num_tasks: N.
        device: where ``weights`` has to be.
        seed: of the training; the same on every rank.
        validation_batches: M, batches in one pass over the largest validation set; 0 without validation.
        fixed_weights: ``[N]`` weights that were computed before the training (CoTBal), else None.
    """

    num_tasks: int
    device: torch.device
    seed: int = 0
    validation_batches: int = 0
    fixed_weights: Tensor | None = None


class BalancingMethod:
    """Base class: equal weights for ever.

    A subclass says what it needs, lists the attributes that a checkpoint must carry in ``stateful`` (tensors, numbers,
    None, and lists or dicts of them), and sets ``self.weights`` with :func:`mean_one`.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    needs: ClassVar[Needs] = Needs()
    stateful: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def equal_steps(cls, options: Any, validation_batches: int, interval: int) -> int:
        """Steps with equal weights before the first that the method chooses, as far as they are known beforehand.

        Args:
            options: an instance of ``Options``.
            validation_batches: as in :class:`MethodContext`.
            interval: steps between two validations.
        """
        return 0

    def __init__(self, context: MethodContext, options: MethodOptions) -> None:
        self.context = context
        self.options = options
        self.weights = torch.ones(context.num_tasks, dtype=torch.float32, device=context.device)

    def before_step(self, losses: TaskLosses | None) -> None:
        """Called before every step; `losses` of its batch when ``needs.losses_before``. ``weights`` then apply."""

    def after_step(self, report: StepReport) -> None:
        """Called after every step when ``needs.losses``. ``weights`` then apply to the next step."""

    def started(self, initial: TaskLosses) -> None:
        """Called once when ``needs.initial``, before anything else: losses before the training, of many records."""

    def validated(self, new: TaskLosses, again: TaskLosses | None) -> None:
        """Called with a validation batch when ``needs.validation``, for the first time before the first step.

        Args:
            new: losses on a batch not seen before in this pass.
            again: losses now on the batch of the previous call, when ``needs.validation_again``.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything that the coming weights depend on."""
        return {name: getattr(self, name) for name in ("weights", *self.stateful)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`."""
        for name in ("weights", *self.stateful):
            setattr(self, name, _to(state[name], self.context.device))


def onto(values: Tensor, device: torch.device) -> Tensor:
    """Values on a device, which the host does not wait for: a copy that is made when the device comes to it."""
    pinned = values.pin_memory() if device.type == "cuda" and values.device.type == "cpu" else values
    return pinned.to(device, non_blocking=True)


def mean_one(w: Tensor) -> Tensor:
    """``lambda = N w / sum(w)`` as float32: any weights ``[N]`` >= 0 in the terms of Eq. 2; all zeros are ones."""
    total = w.sum()
    return torch.where(total == 0, 1.0, w * (len(w) / total)).clamp(min=SMALLEST_WEIGHT).float()


def last_known(losses: TaskLosses, previous: Tensor | None) -> Tensor:
    """``[N]`` float64: L_i, and for an absent task its last one; NaN for a task that was never seen."""
    if previous is None:
        previous = torch.full_like(losses.mean, torch.nan)
    return torch.where(losses.present, losses.mean, previous)


def first_known(losses: TaskLosses, previous: Tensor | None) -> Tensor:
    """``[N]`` float64: L_i(0), the first L_i above 0, since losses are divided by it; NaN for a task that had none."""
    if previous is None:
        previous = torch.full_like(losses.mean, torch.nan)
    usable = losses.present & (losses.mean > 0) & losses.mean.isfinite()
    return torch.where(previous.isnan() & usable, losses.mean, previous)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) and value.is_floating_point() else value
