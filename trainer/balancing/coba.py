"""CoBa: balances how fast validation losses converge (Gong et al., "CoBa", Eq. 2-7), by ``ConvergenceBalancer``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from cotbal_kernels.convergence import ConvergenceBalancer
from trainer.balancing.method import (
    BalancingMethod,
    MethodContext,
    MethodOptions,
    Needs,
    TaskLosses,
    TaskSumOptions,
    mean_one,
)


class CobaOptions(TaskSumOptions):
    """Options of CoBa; M is the number of validation batches in one pass."""

    window: Annotated[int, Field(ge=2)] | None = Field(None, description="N, updates in a slope; none: 2 M")
    warmup: Annotated[int, Field(ge=0)] | None = Field(None, description="W, updates with equal weights; none: M")
    temperature: Annotated[float, Field(gt=0)] = Field(5.0, description="tau of the divergence factor")
    variant: Literal["absolute", "printed", "mftcoder"] = Field(
        "absolute", description="absolute values in Eq. 5-7; as printed; or as in the authors' code"
    )


class CoBa(BalancingMethod):
    """lambda = N w of CoBa, moved at every validation batch. L_i(0) is of many validation records."""

    Options = CobaOptions
    options: CobaOptions
    needs = Needs(validation=True, initial=True)

    @classmethod
    def equal_steps(cls, options: CobaOptions, validation_batches: int, interval: int) -> int:
        # Update u, from 0 on, comes before step u * interval + 1; that of the warm-up's end is the last equal one.
        return (_warmup(options, validation_batches) + (options.variant != "mftcoder")) * interval

    def __init__(self, context: MethodContext, options: MethodOptions) -> None:
        super().__init__(context, options)
        window = self.options.window
        self._balancer = ConvergenceBalancer(
            context.num_tasks,
            window=2 * context.validation_batches if window is None else window,
            warmup=_warmup(self.options, context.validation_batches),
            temperature=self.options.temperature,
            variant=self.options.variant,
            device=context.device,
        )

    def started(self, initial: TaskLosses) -> None:
        self._balancer.start(initial.mean)  # 0, which is no L_i(0), for an absent task

    def validated(self, new: TaskLosses, again: TaskLosses | None) -> None:
        self.weights = mean_one(self._balancer.step(new.mean, present=new.present))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"balancer": self._balancer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._balancer.load_state_dict(state["balancer"])


def _warmup(options: CobaOptions, validation_batches: int) -> int:
    return validation_batches if options.warmup is None else options.warmup
