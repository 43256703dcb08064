"""RLW: random weights for every step (Lin et al., "Reasonable Effectiveness of Random Weighting", TMLR 2022)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from trainer.balancing.method import BalancingMethod, MethodContext, MethodOptions, TaskLosses, mean_one, onto


class RlwOptions(MethodOptions):
    """Options of RLW."""

    distribution: Literal["normal", "dirichlet"] = Field(
        "normal", description="normal: w = softmax(z), z ~ N(0, I); dirichlet: w ~ Dirichlet(1, ..., 1)"
    )


class RandomLossWeighting(BalancingMethod):
    """lambda = N w with a fresh w for every step, from a generator that is the same on every rank."""

    Options = RlwOptions
    options: RlwOptions

    def __init__(self, context: MethodContext, options: MethodOptions) -> None:
        super().__init__(context, options)
        self._generator = torch.Generator().manual_seed(context.seed)  # on the CPU: the same numbers everywhere

    def before_step(self, losses: TaskLosses | None) -> None:
        draw = torch.empty(self.context.num_tasks, dtype=torch.float64)
        if self.options.distribution == "normal":
            w = draw.normal_(generator=self._generator).softmax(0)
        else:  # normalised exponentials are Dirichlet(1, ..., 1)
            w = draw.exponential_(generator=self._generator)
        self.weights = onto(mean_one(w), self.context.device)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._generator.set_state(state["generator"])
