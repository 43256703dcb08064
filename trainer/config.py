"""The run configuration: one YAML file, validated whole before anything starts.

Every component's options are a model of their own here, so that a key has one place, one type and one
default, and an unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from trainer.balancing.config import BalancingConfig, ComparisonConfig, ValidationConfig, option_groups
from trainer.errors import UserError, nearest
from trainer.launching import LaunchConfig
from trainer.models.config import BUILT_IN, ImageConfig, LoraConfig, ModelConfig, TinyLlavaConfig
from trainer.options import MOST_EPOCHS, Options
from trainer.parsing import parse_yaml
from trainer.task_config import BuiltInTasksConfig, TaskConfig

_TASKS_WORD = "literal['built_in']"


class TrainingConfig(Options):
    """One training run; the same for every run of Algorithm 1, so that only the mixture and lambda differ."""

    epochs: Annotated[float, Field(gt=0, le=MOST_EPOCHS)] = Field(
        1.0, description="passes over the training's own mixture"
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(
        16, description="samples per process and micro-batch; with packing, sequences of several samples"
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = Field(
        1,
        description="micro-batches per optimizer step; a smaller `batch_size` and as many more of these are the same "
        "training (docs/machines.md), so finished work and checkpoints stay",
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        2e-5, description="peak, reached after the warm-up; cosine to 0"
    )
    learning_rates: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="peaks of their own for parameters that are trained and have a key in their name, e.g. "
        "`{multi_modal_projector: 2.0e-5}`",
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.03, description="share of the steps, rounded up, the first of them with rate 0; less than one step is none"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of AdamW")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="0 turns clipping off")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="master weights stay fp32")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO; 0 with fp32 only")
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="what ZeRO keeps in the host's memory: optimizer states and steps (stage 1 to 3), with "
        "`parameters` also the parameters that are not in use (stage 3)",
    )
    overlap_comm: bool = Field(
        False,
        description="ZeRO reduces gradients while the backward pass goes on: less waiting for a slow network; off, "
        "since races were reported in it (DeepSpeed issues 5545, 8061)",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward")
    logging_steps: Annotated[int, Field(ge=1)] = Field(
        10, description="optimizer steps per line of log.jsonl, beside the first and the last"
    )
    report_to: list[str] = Field(
        ["tensorboard"],
        description="trackers that logs go to beside log.jsonl: tensorboard, wandb, mlflow and others of transformers",
    )
    save_steps: Annotated[int, Field(ge=1)] = Field(500, description="steps between checkpoints (resume points)")
    dataloader_workers: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="processes that encode samples, for each process of a training, while the GPU computes; 0: it does "
        "that itself, between steps; none: 2 on a GPU, 0 on a CPU. They hand samples over in /dev/shm, which "
        "containers make small (docker's `--shm-size`)",
    )
    packing: bool = Field(False, description="several samples in a sequence of model.max_length tokens (docs/data.md)")
    overlong: Literal["truncate", "refuse", "drop"] = Field(
        "truncate", description="samples of more than model.max_length tokens: cut at the end, an error, or left out"
    )

    @model_validator(mode="after")
    def _zero_can_offload(self) -> TrainingConfig:
        stages = {"none": (0, 1, 2, 3), "optimizer": (1, 2, 3), "parameters": (3,)}[self.offload]
        if self.zero_stage not in stages:
            raise ValueError(
                f"offload: {self.offload} needs zero_stage {' or '.join(map(str, stages))}, got {self.zero_stage}"
            )
        return self

    @model_validator(mode="after")
    def _bf16_needs_zero(self) -> TrainingConfig:
        if self.precision == "bf16" and self.zero_stage == 0:  # DeepSpeed 0.19's unfused optimizer
            raise ValueError(
                "zero_stage: 0 needs precision fp32: with bf16, DeepSpeed makes an empty step of AdamW there before "
                "the first, and updates are too small until its means have forgotten it; choose 1"
            )
        return self

    def workers(self, device: str) -> int:
        """``dataloader_workers`` of a process on ``cpu`` or ``cuda``."""
        if self.dataloader_workers is not None:
            return self.dataloader_workers
        return 0 if device == "cpu" else 2

    def fingerprint(self) -> dict[str, Any]:
        """What results depend on: of batches, how many samples a step has, not how they go through the model."""
        no_matter = {
            "logging_steps",
            "save_steps",
            "dataloader_workers",
            "gradient_checkpointing",
            "report_to",
            "overlap_comm",
            "batch_size",
            "gradient_accumulation_steps",
        }
        samples = {"batch_size x gradient_accumulation_steps": self.batch_size * self.gradient_accumulation_steps}
        return samples | self.model_dump(mode="json", exclude=no_matter)


class EvaluationConfig(Options):
    """Batched greedy generation on validation and test records, shared out over ``launch.processes`` ranks."""

    batch_size: Annotated[int, Field(ge=1)] = Field(
        32,
        description="records that go through the model at once; another number can turn near ties, so what is scored "
        "already stays",
    )


class CotbalConfig(Options):
    """Eq. 3-11 of CoTBal; the defaults are the paper's."""

    temperature: Annotated[float, Field(gt=0)] = Field(0.5, description="T of Eq. 5, 7 and 10")
    alpha: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="alpha of Eq. 11")
    mini_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(1 / 32, description="share of each task in a mini subset")
    strategy: Literal["cotbal", "one2all", "all2one", "contribution", "difficulty"] = Field(
        "cotbal", description="which lambda the final training uses (Table 3)"
    )
    difficulty: Literal["reused", "precise"] = Field(
        "reused", description="Eq. 9 from the proxies, or from one full and one mini model per task alone (Table 3)"
    )
    on_degenerate: Literal["error", "clip"] = Field(
        "error",
        description="when V_j(j+mini) exceeds V_j(mini) by 1 % at most, and Eq. 3 explodes: stop, or bound C and D",
    )


class RunConfig(Options):
    """The whole of Algorithm 1, from records to the report."""

    output_dir: Path = Field(
        description="run directory; a run on the same one continues, and keeps what no change touches"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="of minis, data order and random weights; 0 to 2^32 - 1, for the last of `seeds` too"
    )
    tasks: list[TaskConfig] | Literal["built_in"] = Field(description="a list of tasks, or `built_in`")
    built_in: BuiltInTasksConfig = BuiltInTasksConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cotbal: CotbalConfig = CotbalConfig()
    balancing: BalancingConfig = BalancingConfig()
    comparisons: list[ComparisonConfig] = Field(
        [ComparisonConfig(method="stl"), ComparisonConfig(method="ew")],
        description="trained beside CoTBal: methods by name, or `{name, method, options}`; "
        "stl is the baseline of Delta I and Delta E",
    )
    seeds: Annotated[int, Field(ge=1)] = Field(
        1, description="trainings of every final model, with `seed`, `seed` + 1, ...; proxies are trained once"
    )
    launch: LaunchConfig = LaunchConfig()

    @field_validator("tasks")
    @classmethod
    def _names_are_unique(cls, tasks: Any) -> Any:
        if isinstance(tasks, list):
            names = [task.name for task in tasks]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"task names must be unique; given twice: {', '.join(twice)}")
        return tasks

    @field_validator("comparisons")
    @classmethod
    def _trained_once(cls, comparisons: list[ComparisonConfig]) -> list[ComparisonConfig]:
        names = [comparison.name for comparison in comparisons]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"names must be unique; given twice: {', '.join(twice)}")
        return [comparison for comparison in comparisons if comparison.name != "cotbal"]  # which every run trains

    @field_validator("seeds")
    @classmethod
    def _last_seed_fits(cls, seeds: int, others: ValidationInfo) -> int:
        last = others.data.get("seed", 0) + seeds - 1
        if last >= 2**32:  # numpy takes no larger one
            raise ValueError(f"the last seed, seed + seeds - 1 = {last}, must be less than {2**32}; lower seed")
        return seeds

    @field_validator("output_dir")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return path.absolute()

    def method_options(self, comparison: ComparisonConfig) -> dict[str, Any]:
        """The options of a comparison's method: its own over those of the group ``balancing``."""
        return self.balancing.options.get(comparison.method, {}) | comparison.options

    def to_yaml(self) -> str:
        """The resolved configuration, loadable again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Reads and validates a YAML configuration.

    Relative paths of data and of the model are taken from the configuration file's folder; ``output_dir`` and those of
    overrides from the current one. ``${NAME}`` in a path is the environment variable of that name.

    Args:
        path: the YAML file.
        overrides: dotted keys to values, laid over the file (``{"training.epochs": 2}``).

    Raises:
        UserError: the file is missing, is not YAML, or a key or value is not valid; every problem is listed.
    """
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"configuration {path} does not exist") from error
    except OSError as error:
        raise UserError(f"configuration {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"configuration {path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"configuration {path} must be a mapping of options, got {type(data).__name__}")
    for dotted, value in (overrides or {}).items():
        alone: dict[str, Any] = {}
        _set(alone, dotted, value)
        _expand_variables(alone, "--set")
        _resolve_paths(alone, Path())
        _set(data, dotted, reduce(getitem, dotted.split("."), alone))
    _expand_variables(data, str(path))
    _resolve_paths(data, path.parent)
    return parse_config(data, str(path))


def parse_config(data: dict[str, Any], source: str) -> RunConfig:
    """Validates a configuration given as a mapping; `source` names it in errors."""
    try:
        config = RunConfig.model_validate(data)
        # Asked of a run only: the pretraining of the built-in model is a training on an auxiliary task alone.
        if isinstance(config.tasks, list) and all(task.auxiliary for task in config.tasks):
            problem = "tasks: at least one task must be balanced (auxiliary: false)"
            raise UserError(f"{source} is not a valid configuration:\n  {problem}")
        return config
    except ValidationError as error:
        raise UserError(f"{source} is not a valid configuration:\n{_explain(error)}") from error


def reference() -> str:
    """Every key with its type, default and meaning, as Markdown (``docs/configuration.md``)."""
    groups: list[tuple[str, type[BaseModel]]] = [("", RunConfig), ("tasks[]", TaskConfig)]
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            groups.append((name, field.annotation))
    groups += [
        ("model.tiny_llava", TinyLlavaConfig),
        ("model.images", ImageConfig),
        ("model.lora", LoraConfig),
        ("balancing.validation", ValidationConfig),
    ]
    groups.append(("comparisons[]", ComparisonConfig))
    groups += option_groups().items()
    lines = [
        "# Configuration",
        "",
        "Made from `trainer/config.py` by `python -m trainer.config`.",
        "",
        "Relative paths of tasks and of the model are taken from the folder of the configuration file; `output_dir`",
        "and what `--set` gives, from the current one. A run says where it writes; started from another folder it",
        "would be another run, unless `output_dir` is absolute. In a path `~` is the home folder and `${NAME}` an",
        "environment variable; inside `{...}` such a path needs quotes.",
    ]
    for prefix, model in groups:
        lines += [
            "",
            f"## `{prefix}`" if prefix else "## Top level",
            "",
            (model.__doc__ or "").strip().split("\n")[0],
            "",
        ]
        lines += ["| key | default | meaning |", "|---|---|---|"]
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                continue
            default = "required" if field.is_required() else f"`{_shown(field.default)}`"
            meaning = field.description or ""
            if get_origin(field.annotation) is Literal:
                choices = ", ".join(f"`{option}`" for option in get_args(field.annotation))
                meaning = f"one of {choices}" + (f"; {meaning}" if meaning else "")
            lines.append(f"| `{name}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _shown(default: Any) -> Any:
    if isinstance(default, list):
        return [item.name if isinstance(item, ComparisonConfig) else item for item in default]
    return default


def _set(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for key in parents:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise UserError(f"cannot set '{dotted}': '{key}' is not a group of options")
    data[last] = value


def _expand_variables(data: dict[str, Any], source: str) -> None:
    """Puts environment variables and ``~`` into paths: those of tasks, ``model.path`` and ``output_dir``."""
    places = [*_task_paths(data), ("output_dir", data, "output_dir")]
    if isinstance(data.get("model"), dict):
        places += [("model.path", data["model"], "path")]
    for where, group, key in places:
        if isinstance(group.get(key), str):
            for name in re.findall(r"\$\{(\w+)\}", group[key]):
                if name not in os.environ:
                    raise UserError(f"{source}: {where} needs the environment variable {name}, which is not set")
                group[key] = group[key].replace(f"${{{name}}}", os.environ[name])
            group[key] = os.path.expanduser(group[key])


def _task_paths(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Where paths of tasks are: the place as errors call it, the mapping that has it, and the key in that."""
    tasks = data.get("tasks")
    for number, task in enumerate(tasks if isinstance(tasks, list) else []):
        for key in ("train", "validation", "test", "image_root") if isinstance(task, dict) else ():
            if isinstance(task.get(key), dict):
                yield from ((f"tasks.{number}.{key}.{name}", task[key], name) for name in task[key])
            else:
                yield f"tasks.{number}.{key}", task, key


def _resolve_paths(data: dict[str, Any], folder: Path) -> None:
    for _, group, key in _task_paths(data):
        if isinstance(group.get(key, "." if key == "image_root" else None), str):
            group[key] = str((folder / group.get(key, ".")).absolute())
    model = data.get("model")
    if isinstance(model, dict) and isinstance(model.get("path"), str) and (folder / model["path"]).is_dir():
        model["path"] = str((folder / model["path"]).absolute())


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        location, given = problem["loc"], problem.get("input")
        # `tasks` is a list or a word, and pydantic reports how either alternative fails, each under a name of its own.
        if location == ("tasks", _TASKS_WORD):
            if not isinstance(given, list):
                lines.append(f"  tasks: must be a list of tasks or '{BUILT_IN}' (got {given!r})")
            continue
        if problem["type"] == "list_type" and location[:-1] == ("tasks",):
            continue
        where = [str(part) for part in location if not str(part).startswith("list[")]
        name = ".".join(where)
        if problem["type"] == "extra_forbidden":
            lines.append(f"  {name}: unknown key{nearest(where[-1], _valid_keys(where[:-1]))}")
        else:
            shown = f" (got {given!r})" if isinstance(given, (str, int, float, bool)) else ""
            if isinstance(given, bool) and problem["type"] in ("string_type", "path_type", "literal_error"):
                shown = f" (got {given!r}, as YAML reads yes, no, on and off; put the word in quotes)"
            lines.append(f"  {name}: {problem['msg'].removeprefix('Value error, ')}{shown}")
    return "\n".join(lines)


def _valid_keys(location: list[str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in location:
        if part in ("tasks", "comparisons"):
            model = TaskConfig if part == "tasks" else ComparisonConfig
        elif part in model.model_fields:
            annotation = model.model_fields[part].annotation
            for option in get_args(annotation) or (annotation,):  # `lora` is a group or none
                if isinstance(option, type) and issubclass(option, BaseModel):
                    model = option
    return list(model.model_fields)


if __name__ == "__main__":
    print(reference(), end="")
