"""FAMO: lowers all losses at an equal rate (Liu et al., "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from trainer.balancing.adam import VectorAdam
from trainer.balancing.method import (
    BalancingMethod,
    MethodContext,
    MethodOptions,
    Needs,
    StepReport,
    TaskLosses,
    TaskSumOptions,
    last_known,
    mean_one,
)


class FamoOptions(TaskSumOptions):
    """Options of FAMO and FAMO*."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(0.025, description="of Adam on xi")
    decay: Annotated[float, Field(ge=0)] = Field(0.01, description="gamma, L2 decay of xi")
    minimum_loss: float = Field(0.0, description="the loss that no task can go below")


class Famo(BalancingMethod):
    """z = softmax(xi), D_i = max(L_i - minimum, 0) + 1e-8, c = sum z_i / D_i; the step descends sum_i z_i log D_i / c.

    The gradient of that loss is sum_i w_i grad L_i with w_i = z_i / (c D_i), which sums to 1: these are the weights.
    D is of the step's own batch, so its losses are measured before the step, and once more after it:
    delta = log D_before - log D_after, and xi takes an Adam step along J_softmax^T delta. A task that is absent from
    the batch has delta 0 and keeps its last D; before it was seen, D is the mean of the others'. The 1e-8 is of FAMO's
    public code. There a loss below the minimum ends in the log of a negative number; here it counts as the minimum.
    """

    Options = FamoOptions
    options: FamoOptions
    needs = Needs(losses=True, losses_before=True, losses_after=True)
    stateful: ClassVar[tuple[str, ...]] = ("xi", "last")

    def __init__(self, context: MethodContext, options: MethodOptions) -> None:
        super().__init__(context, options)
        self.xi = torch.zeros(context.num_tasks, dtype=torch.float64, device=context.device)
        self.last: Tensor | None = None
        self._before: TaskLosses | None = None
        self._adam = VectorAdam(self.xi, self.options.learning_rate, self.options.decay)

    def before_step(self, losses: TaskLosses | None) -> None:
        assert losses is not None
        self._before = losses
        self.last = last_known(losses, self.last)
        seen = ~self.last.isnan()
        D = self._distance(self.last)
        D = torch.where(seen, D, torch.where(seen, D, 0.0).sum() / seen.sum())
        self.weights = torch.where(seen.any(), mean_one(self.xi.softmax(0) / D), self.weights)

    def after_step(self, report: StepReport) -> None:
        assert self._before is not None
        assert report.losses_after is not None
        self._descend(self._before, report.losses_after)

    def _distance(self, loss: Tensor) -> Tensor:
        return (loss - self.options.minimum_loss).clamp(min=0) + 1e-8

    def _descend(self, before: TaskLosses, after: TaskLosses) -> None:
        # 0 for an absent task, whose mean is 0 both times.
        delta = self._distance(before.mean).log() - self._distance(after.mean).log()
        z = self.xi.softmax(0)
        self.xi = self._adam.step(self.xi, z * (delta - (z * delta).sum()))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"adam": self._adam.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._adam.state = {name: value.to(self.context.device) for name, value in state["adam"].items()}


class FamoStar(Famo):
    """FAMO*: xi follows validation losses, and the step descends the plain sum_i z_i L_i (CoBa, footnote 2).

    delta compares the losses on one validation batch before and after the steps between two updates.
    """

    needs = Needs(validation=True, validation_again=True)
    stateful = ("xi", "validation_sum", "validation_tokens")

    def __init__(self, context: MethodContext, options: MethodOptions) -> None:
        super().__init__(context, options)
        self.validation_sum = torch.zeros_like(self.xi)
        self.validation_tokens = torch.zeros_like(self.xi)

    def before_step(self, losses: TaskLosses | None) -> None:
        """The weights moved when the last validation batch was seen."""

    def validated(self, new: TaskLosses, again: TaskLosses | None) -> None:
        if again is not None:
            self._descend(TaskLosses(self.validation_sum, self.validation_tokens), again)
            self.weights = mean_one(self.xi.softmax(0))
        self.validation_sum, self.validation_tokens = new.loss_sum, new.tokens
