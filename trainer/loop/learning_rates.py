"""Learning rates of parts of a model, as LLaVA gives its projector one of its own (``mm_projector_lr``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import Optimizer

from trainer.errors import UserError


def own_rates(names: Iterable[str], rates: Mapping[str, float]) -> dict[str, float]:
    """The rate of every parameter that an entry of ``training.learning_rates`` names.

    Args:
        names: of the parameters that are trained.
        rates: peak learning rates by a part of the name.

    Raises:
        UserError: an entry is in no name, or two are in one.
    """
    found: dict[str, str] = {}
    for name in names:
        parts = sorted(part for part in rates if part in name)
        if len(parts) > 1:
            raise UserError(
                f"training.learning_rates: '{parts[0]}' and '{parts[1]}' are both in the name of {name}; "
                "name parts that do not overlap"
            )
        if parts:
            found[name] = parts[0]
    for part in rates:
        if part not in found.values():
            raise UserError(f"training.learning_rates: no parameter that is trained has '{part}' in its name")
    return {name: rates[part] for name, part in found.items()}


def set_own_rates(optimizer: Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Splits the groups of a new optimizer by learning rate; every other option of a group stays.

    Schedules scale the rate that a group begins with, so that all rise and fall together.

    Raises:
        UserError: as :func:`own_rates`.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    by_name = own_rates(trained, rates)
    by_parameter = {trained[name]: rate for name, rate in by_name.items()}
    groups = []
    for group in optimizer.param_groups:
        split: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            split.setdefault(by_parameter.get(parameter, group["lr"]), []).append(parameter)
        groups += [{**group, "params": parameters, "lr": rate} for rate, parameters in split.items()]
    # The others first: what is logged as the learning rate is that of the first group.
    optimizer.param_groups[:] = sorted(groups, key=lambda group: group["lr"] != optimizer.defaults["lr"])
