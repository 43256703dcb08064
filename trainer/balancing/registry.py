"""Names of the balancing methods. A new one is a line here and a file beside it (docs/balancing.md shows how).

Classes are imported when asked for, so that reading a configuration needs no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from trainer.errors import UserError, nearest, unknown_name

if TYPE_CHECKING:
    from trainer.balancing.method import BalancingMethod, MethodOptions

SINGLE_TASK = "stl"  # one model per task: no method of one training, but a name wherever methods are compared
SINGLE_TASK_LABEL = "STL"


@dataclass(frozen=True)
class Entry:
    """A method's name in tables and plots, its class as ``module:Class``, and the options its name stands for.

    ``moves`` says that its weights change during a training.
    """

    label: str
    target: str
    options: dict[str, Any] = field(default_factory=dict)
    moves: bool = True


_HERE = "trainer.balancing"
METHODS: dict[str, Entry] = {
    "ew": Entry("EW", f"{_HERE}.fixed:EqualWeighting", moves=False),
    "tla": Entry("TLA", f"{_HERE}.fixed:TaskLevelAggregation", moves=False),
    "uniform": Entry("Uniform", f"{_HERE}.fixed:Uniform", moves=False),
    "rlw": Entry("RLW", f"{_HERE}.rlw:RandomLossWeighting"),
    "dwa": Entry("DWA", f"{_HERE}.dwa:DynamicWeightAverage"),
    "igbv1": Entry("IGBv1", f"{_HERE}.igb:ImprovableGapBalancing"),
    "gradnorm": Entry("GradNorm", f"{_HERE}.gradnorm:GradNorm"),
    "lbtw": Entry("LBTW", f"{_HERE}.lbtw:LossBalancedTaskWeighting"),
    "famo": Entry("FAMO", f"{_HERE}.famo:Famo"),
    "gradnorm_star": Entry("GradNorm*", f"{_HERE}.gradnorm:GradNormStar"),
    "lbtw_star": Entry("LBTW*", f"{_HERE}.lbtw:LossBalancedTaskWeightingStar"),
    "famo_star": Entry("FAMO*", f"{_HERE}.famo:FamoStar"),
    "coba": Entry("CoBa", f"{_HERE}.coba:CoBa"),
    "cotbal": Entry("CoTBal", f"{_HERE}.fixed:CoTBal", moves=False),
    "cotbal_one2all": Entry("CoTBal one2all", f"{_HERE}.fixed:CoTBal", {"strategy": "one2all"}, moves=False),
    "cotbal_all2one": Entry("CoTBal all2one", f"{_HERE}.fixed:CoTBal", {"strategy": "all2one"}, moves=False),
    "cotbal_contribution": Entry("CoTBal C", f"{_HERE}.fixed:CoTBal", {"strategy": "contribution"}, moves=False),
    "cotbal_difficulty": Entry("CoTBal D", f"{_HERE}.fixed:CoTBal", {"strategy": "difficulty"}, moves=False),
    "cotbal_precise": Entry("CoTBal precise D", f"{_HERE}.fixed:CoTBal", {"difficulty": "precise"}, moves=False),
}


def is_cotbal(name: str) -> bool:
    """Whether the method's weights are computed by Eq. 3-11 before the training."""
    return name in METHODS and METHODS[name].target == METHODS["cotbal"].target


def check_name(name: str) -> str:
    """`name`, or an error that names the nearest method or ``stl``."""
    if name != SINGLE_TASK and name not in METHODS:
        raise unknown_name("method", name, (SINGLE_TASK, *METHODS))
    return name


def training_label(training: str) -> str:
    """The row of a run's final training in tables; ``stl-<task>`` is one of STL's, ``<name>@1`` is another seed."""
    name = training.partition("@")[0]
    if name.startswith(f"{SINGLE_TASK}-"):
        return SINGLE_TASK_LABEL
    return METHODS[name].label if name in METHODS else name


def method_class(name: str) -> type[BalancingMethod]:
    """The class behind a name.

    Raises:
        UserError: no method has this name.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    module, _, attribute = METHODS[name].target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def name_of(method: BalancingMethod) -> str:
    """The name of the method's class; CoTBal's ablations, which differ in their weights alone, have that of CoTBal."""
    target = f"{type(method).__module__}:{type(method).__name__}"
    return next((name for name, entry in METHODS.items() if entry.target == target), target)


def read_options(name: str, given: Mapping[str, Any] | None = None) -> MethodOptions:
    """The method's options: what its name stands for, overlaid with what was given.

    Raises:
        UserError: an unknown option or a bad value; every problem is listed.
    """
    options = method_class(name).Options
    try:
        return options.model_validate(METHODS[name].options | dict(given or {}))
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                problems.append(f"{key}: unknown key{nearest(key, options.model_fields)}")
            else:
                problems.append(f"{key}: {problem['msg'].removeprefix('Value error, ')} (got {problem['input']!r})")
        raise UserError(f"options of method '{name}': {'; '.join(problems)}") from error
