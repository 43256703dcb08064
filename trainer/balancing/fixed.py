"""Weights that do not move during a training: EW, TLA, Uniform, and those of CoTBal."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.balancing.method import Aggregation, BalancingMethod, MethodContext, MethodOptions, TaskSumOptions


class EqualWeighting(BalancingMethod):
    """EW: lambda = 1, the usual mixture (CoTBal, Eq. 1)."""


class TaskLevelOptions(MethodOptions):
    """Options of TLA."""

    aggregation: Aggregation = Field("task", description="token: Eq. 2; task: TLA; task_sum: sum of w_i L_i")


class TaskLevelAggregation(BalancingMethod):
    """TLA: (1 / N_present) sum_i L_i, tasks that are absent from the step left out (CoTBal, section 4.1)."""

    Options = TaskLevelOptions


class Uniform(BalancingMethod):
    """Uniform: sum_i L_i / N (CoBa, section 4); a task that is absent from the step counts as 0."""

    Options = TaskSumOptions


class CotbalOptions(MethodOptions):
    """Eq. 3-11; what is not given is taken from the configuration's group ``cotbal``."""

    temperature: Annotated[float, Field(gt=0)] | None = Field(None, description="T of Eq. 5, 7 and 10")
    alpha: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="alpha of Eq. 11")
    strategy: Literal["cotbal", "one2all", "all2one", "contribution", "difficulty"] | None = Field(
        None, description="which lambda is used (Table 3)"
    )
    difficulty: Literal["reused", "precise"] | None = Field(None, description="which models Eq. 9 compares (Table 3)")


class CoTBal(BalancingMethod):
    """CoTBal and its ablations: lambda of Eq. 11 (or 5, 7, 8, 10), computed before the training (Algorithm 1)."""

    Options = CotbalOptions

    def __init__(self, context: MethodContext, options: MethodOptions) -> None:
        super().__init__(context, options)
        if context.fixed_weights is None:
            raise ValueError("CoTBal needs the weights that Algorithm 1 found before the training")
        self.weights = context.fixed_weights.to(context.device).float()
