"""LBTW: weights from how much of a task's loss is left (Liu et al., "Loss-Balanced Task Weighting", AAAI 2019)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from trainer.balancing.method import (
    BalancingMethod,
    MethodContext,
    MethodOptions,
    Needs,
    StepReport,
    TaskLosses,
    TaskSumOptions,
    first_known,
    last_known,
    mean_one,
)


class LbtwOptions(TaskSumOptions):
    """Options of LBTW and LBTW*."""

    exponent: Annotated[float, Field(ge=0)] = Field(0.5, description="b")


class LossBalancedTaskWeighting(BalancingMethod):
    """w_i = (L_i / L_i(0))^b, from training losses. L_i(0) is the task's first loss above 0.

    A task that is absent keeps its last ratio, and has the ratio 1 before it was seen.
    """

    Options = LbtwOptions
    options: LbtwOptions
    needs = Needs(losses=True)
    stateful = ("first", "last")

    def __init__(self, context: MethodContext, options: MethodOptions) -> None:
        super().__init__(context, options)
        self.first: Tensor | None = None
        self.last: Tensor | None = None

    def after_step(self, report: StepReport) -> None:
        self._update(report.losses)

    def _update(self, losses: TaskLosses) -> None:
        self.last = last_known(losses, self.last)
        self.first = first_known(losses, self.first)
        ratio = (self.last / self.first).nan_to_num(nan=1.0)
        self.weights = mean_one(ratio**self.options.exponent)


class LossBalancedTaskWeightingStar(LossBalancedTaskWeighting):
    """LBTW*: the same from validation losses (CoBa, section 4), L_i(0) of many records."""

    needs = Needs(validation=True, initial=True)

    def started(self, initial: TaskLosses) -> None:
        self.first = first_known(initial, None)

    def validated(self, new: TaskLosses, again: TaskLosses | None) -> None:
        self._update(new)
