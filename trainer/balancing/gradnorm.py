"""GradNorm: equalises the sizes of the tasks' gradients (Chen et al., "GradNorm", ICML 2018), at the head's weight."""

from __future__ import annotations

from typing import Annotated, Any

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
    first_known,
    mean_one,
)


class GradNormOptions(TaskSumOptions):
    """Options of GradNorm and GradNorm*."""

    asymmetry: Annotated[float, Field(ge=0)] = Field(1.5, description="a, how strongly slow tasks are favoured")
    learning_rate: Annotated[float, Field(gt=0)] = Field(0.025, description="of Adam on w")


class GradNorm(BalancingMethod):
    """One Adam step per training step on ``sum_i |G_i - mean(G) r_i^a|``, then w is scaled back to sum N.

    G_i = w_i * norm of d L_i / d lm_head.weight over the whole step; r_i = (L_i / L_i(0)) / mean, the relative inverse
    training rate. The target ``mean(G) r_i^a`` is a constant to the gradient. Means run over the tasks present in the
    step; an absent one has no gradient. L_i(0) is the task's first loss above 0; until then r_i = 1.
    """

    Options = GradNormOptions
    options: GradNormOptions
    needs = Needs(losses=True, gradient_norms=True)
    stateful = ("w", "first")

    def __init__(self, context: MethodContext, options: MethodOptions) -> None:
        super().__init__(context, options)
        self.w = torch.ones(context.num_tasks, dtype=torch.float64, device=context.device)
        self.first = torch.full_like(self.w, torch.nan)
        self._adam = VectorAdam(self.w, self.options.learning_rate)

    def after_step(self, report: StepReport) -> None:
        self._update(report.losses)

    def _update(self, losses: TaskLosses) -> None:
        assert losses.gradient_norms is not None
        present = losses.present
        self.first = first_known(losses, self.first)

        def mean(values: Tensor, of: Tensor) -> Tensor:
            return torch.where(of, values, 0.0).sum() / of.sum()

        norms = losses.gradient_norms
        G = self.w * norms
        left = losses.mean / self.first
        r = (left / mean(left, present & ~self.first.isnan())).nan_to_num(nan=1.0)
        target = mean(G, present) * r**self.options.asymmetry
        gradient = torch.where(present, torch.sign(G - target) * norms, 0.0)
        w = self._adam.step(self.w, gradient).clamp(min=1e-6)  # a negative weight would ascend the task's loss
        self.w = w * (len(w) / w.sum())
        self.weights = mean_one(self.w)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"adam": self._adam.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._adam.state = {name: value.to(self.context.device) for name, value in state["adam"].items()}


class GradNormStar(GradNorm):
    """GradNorm*: losses and gradient norms of validation batches (CoBa, section 4), L_i(0) of many records."""

    needs = Needs(validation=True, initial=True, validation_gradient_norms=True)

    def started(self, initial: TaskLosses) -> None:
        self.first = first_known(initial, None)

    def validated(self, new: TaskLosses, again: TaskLosses | None) -> None:
        self._update(new)
