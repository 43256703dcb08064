"""DWA: more weight for tasks whose loss falls slowly (Liu et al., "End-to-End Multi-Task Learning with Attention")."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.balancing.method import (
    BalancingMethod,
    MethodContext,
    MethodOptions,
    Needs,
    StepReport,
    mean_one,
)


class DwaOptions(MethodOptions):
    """Options of DWA."""

    temperature: Annotated[float, Field(gt=0)] = Field(2.0, description="T")
    form: Literal["iteration", "epoch"] = Field(
        "iteration", description="compare two windows of steps, after every step; or the last two epochs"
    )
    window: Annotated[int, Field(ge=1)] = Field(25, description="steps in a window of the iteration form")


class DynamicWeightAverage(BalancingMethod):
    """lambda = N softmax(r / T), r_i = L_i(t - 1) / L_i(t - 2), with L_i the token mean over a window or an epoch.

    Until both exist lambda is 1. A task without a token in either of them, or with the loss 0 in the first, has
    r_i = 1.
    """

    Options = DwaOptions
    options: DwaOptions
    needs = Needs(losses=True)
    stateful = ("history", "epochs")

    @classmethod
    def equal_steps(cls, options: DwaOptions, validation_batches: int, interval: int) -> int:
        return 2 * options.window if options.form == "iteration" else 0

    def __init__(self, context: MethodContext, options: MethodOptions) -> None:
        super().__init__(context, options)
        # Rows of loss sums and tokens [., 2, N]: one per step, or one per epoch, the last one unfinished.
        self.history = torch.zeros(0, 2, context.num_tasks, dtype=torch.float64, device=context.device)
        self.epochs = 0

    def after_step(self, report: StepReport) -> None:
        row = torch.stack([report.losses.loss_sum, report.losses.tokens])[None]
        if self.options.form == "iteration":
            window = self.options.window
            self.history = torch.cat([self.history, row])[-2 * window :]
            if len(self.history) == 2 * window:
                self._set(self.history[window:].sum(0), self.history[:window].sum(0))
            return
        self.history = torch.cat([self.history[:-1], self.history[-1:] + row]) if len(self.history) else row
        if int(report.epoch) > self.epochs:
            self.epochs = int(report.epoch)
            if len(self.history) == 2:
                self._set(self.history[1], self.history[0])
            self.history = torch.cat([self.history[-1:], torch.zeros_like(row)])

    def _set(self, last: Tensor, before: Tensor) -> None:
        both = (last[1] > 0) & (before[0] > 0)
        ratio = (last[0] * before[1]) / (last[1] * before[0])
        r = torch.where(both, ratio, 1.0)
        self.weights = mean_one((r / self.options.temperature).softmax(0))
