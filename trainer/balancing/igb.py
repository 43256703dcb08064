"""IGBv1: more weight for tasks with much of an early loss left (Dai et al., "Improvable Gap Balancing", UAI 2023)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from trainer.balancing.method import (
    BalancingMethod,
    MethodContext,
    MethodOptions,
    Needs,
    StepReport,
    last_known,
    mean_one,
)


class IgbOptions(MethodOptions):
    """Options of IGBv1."""

    base_start: Annotated[int, Field(ge=0)] = Field(100, description="first step of the base loss, counted from 0")
    base_steps: Annotated[int, Field(ge=1)] = Field(100, description="steps that the base loss is the mean of")


class ImprovableGapBalancing(BalancingMethod):
    """lambda = N softmax(L_i(t) / base_i), base_i the token-mean loss of steps 100-199; 1 until the base exists.

    A task that is absent from a step keeps its last loss; one without any token in the base, or with the
    loss 0 there, has the ratio 1.
    """

    Options = IgbOptions
    options: IgbOptions
    needs = Needs(losses=True)
    stateful = ("base", "last")

    @classmethod
    def equal_steps(cls, options: IgbOptions, validation_batches: int, interval: int) -> int:
        return options.base_start + options.base_steps

    def __init__(self, context: MethodContext, options: MethodOptions) -> None:
        super().__init__(context, options)
        self.base = torch.zeros(2, context.num_tasks, dtype=torch.float64, device=context.device)  # sums and tokens
        self.last: Tensor | None = None

    def after_step(self, report: StepReport) -> None:
        self.last = last_known(report.losses, self.last)
        index, first = report.step - 1, self.options.base_start
        if first <= index < first + self.options.base_steps:
            self.base = self.base + torch.stack([report.losses.loss_sum, report.losses.tokens])
        if index >= first + self.options.base_steps - 1:
            ratio = self.last * self.base[1] / self.base[0]
            self.weights = mean_one(torch.where(self.base[0] > 0, ratio, 1.0).softmax(0))
