"""The parts of the configuration about balancing: which method, its options, and what to compare."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, field_validator, model_serializer, model_validator

from trainer.balancing.registry import (
    METHODS,
    SINGLE_TASK,
    SINGLE_TASK_LABEL,
    check_name,
    is_cotbal,
    method_class,
    read_options,
)
from trainer.options import NAME, Options

# Names of the other trainings of a run, and of the rows of its tables that no training has.
RESERVED = ("mini", "pretraining", "majority", "question_only")
RESERVED_PREFIXES = ("plus-", "alone-", f"{SINGLE_TASK}-")


class ValidationConfig(Options):
    """Validation batches inside a training, for the methods that ask for them."""

    interval: Annotated[int, Field(ge=1)] = Field(1, description="optimizer steps between two updates of the weights")
    samples_per_task: Annotated[int, Field(ge=1)] = Field(
        1, description="validation records of each task in an update, over all processes"
    )


class BalancingConfig(Options):
    """The method of ``cotbal train``, and options of the methods wherever they are used (docs/balancing.md)."""

    method: str = Field("ew", description="for `cotbal train`; `cotbal run` trains CoTBal and the `comparisons`")
    validation: ValidationConfig = ValidationConfig()
    options: dict[str, dict[str, Any]] = Field({}, description="by method, e.g. `{rlw: {distribution: dirichlet}}`")

    @field_validator("method")
    @classmethod
    def _method_exists(cls, method: str) -> str:
        return check_name(method)

    @field_validator("options")
    @classmethod
    def _options_exist(cls, options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, given in options.items():
            if is_cotbal(name):
                raise ValueError(f"the options of '{name}' are the group 'cotbal', and those of `comparisons`")
            read_options(name, given)
        return options


class ComparisonConfig(Options):
    """One training that CoTBal is compared with; a method's name alone is short for ``{method: NAME}``."""

    method: str
    name: str = Field("", description="in folders and tables; the method's when left out")
    options: dict[str, Any] = Field({}, description="laid over `balancing.options` of the method")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        return {"method": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _complete(self) -> ComparisonConfig:
        check_name(self.method)
        self.name = self.name or self.method
        if not NAME.fullmatch(self.name):
            raise ValueError(f"comparison name '{self.name}' must be letters, digits, '_', '-', '.' only")
        if self.name in RESERVED or self.name.startswith(RESERVED_PREFIXES):
            raise ValueError(f"comparison name '{self.name}' belongs to another part of the run; choose another")
        taken = {word.lower() for name, method in METHODS.items() for word in (name, method.label)}
        if self.name != self.method and self.name.lower() in {*taken, SINGLE_TASK_LABEL.lower()}:
            raise ValueError(f"comparison name '{self.name}' is a method's; choose another")
        if self.options:
            if self.method == SINGLE_TASK:
                raise ValueError("'stl' has no options")
            if self.name == self.method:
                raise ValueError(f"'{self.method}' with options of its own needs a name, e.g. name: {self.method}_2")
            read_options(self.method, self.options)
        return self

    @model_serializer
    def _short(self) -> Any:
        if self.name == self.method:
            return self.method
        return {"name": self.name, "method": self.method, "options": self.options}


def option_groups() -> dict[str, type[BaseModel]]:
    """The options of every method by their place in the configuration; methods that share them are named together."""
    shared: dict[type[BaseModel], list[str]] = {}
    for name in METHODS:
        if not is_cotbal(name):
            shared.setdefault(method_class(name).Options, []).append(name)
    groups = {f"balancing.options.{', '.join(names)}": options for options, names in shared.items()}
    return groups | {"comparisons[].options (cotbal)": method_class("cotbal").Options}
