"""The configuration of a task: its record files and its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from trainer.metrics import get_metric, takes_losses
from trainer.options import NAME, SET_NAME, Options


def set_title(split: str, part: str) -> str:
    """How errors call the records of a split, or those of one of its named sets."""
    return f"{split} set '{part}'" if part else f"{split} set"


class TaskConfig(Options):
    """One task: its record files, its metrics, and whether CoTBal balances it."""

    name: str = Field(description="used in file names, tables and plots")
    train: Path = Field(description="records (.json or .jsonl) in the LLaVA conversation format")
    validation: Path | None = Field(None, description="scored for V_j in Algorithm 1")
    test: Path | dict[str, Path] | None = Field(
        None,
        description="scored for Delta I and Delta E: a file, or several sets, `{testA: a.jsonl, testB: b.jsonl}`",
    )
    image_root: Path = Field(Path("."), description="folder that the records' image paths start from")
    metric: str | None = Field(
        None,
        description="exact_match, accuracy_iou, cider, vqa_accuracy, gqa_accuracy, chartqa_strict, chartqa_relaxed, "
        "span_f1, bleu or perplexity; none for an auxiliary task",
    )
    test_metrics: list[str] = Field([], description="what every test set is scored with; empty: `metric`")
    auxiliary: bool = Field(False, description="in every mixture with weight 1, outside balancing")
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(32, description="longest generated answer in tokens")
    description: str = Field("", description="one line for the report")

    def record_files(self, split: str) -> dict[str, Path]:
        """The files of ``train``, ``validation`` or ``test`` by set; the name of a set without one is empty."""
        given = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        if given is None:
            return {}
        return given if isinstance(given, dict) else {"": given}

    def scored_with(self, split: str) -> tuple[str, ...]:
        """The metrics of ``validation`` or ``test``."""
        own = self.test_metrics if split == "test" else []
        return tuple(own or ([self.metric] if self.metric else []))

    def title(self, split: str, part: str = "") -> str:
        """How errors call the records of a split, or of one of its sets."""
        return f"task '{self.name}', {set_title(split, part)} {self.record_files(split)[part]}"

    def record_title(self, split: str, part: str, record: str) -> str:
        """How errors call the record of that id."""
        return f"task '{self.name}', {f'{set_title(split, part)},' if part else split} record '{record}'"

    @field_validator("name")
    @classmethod
    def _usable_in_paths(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(f"task name '{name}' must be letters, digits, '_', '-', '.' only")
        return name

    @field_validator("metric")
    @classmethod
    def _metric_exists(cls, metric: str | None) -> str | None:
        if metric is not None:
            get_metric(metric)
        return metric

    @field_validator("test", mode="before")
    @classmethod
    def _one_file_or_named_ones(cls, test: Any) -> Any:
        if test is None or isinstance(test, (str, Path)):
            return test
        if not isinstance(test, dict) or not test:
            raise ValueError("must be a file of records, or files by name: {testA: a.jsonl, testB: b.jsonl}")
        for name, file in test.items():
            if isinstance(name, bool):
                raise ValueError(f"test set name {name}, as YAML reads yes, no, on and off; put the word in quotes")
            if not SET_NAME.fullmatch(str(name)):
                raise ValueError(f"test set name '{name}' must be letters, digits, '_', '-', '.', '+' only")
            if not isinstance(file, (str, Path)):
                raise ValueError(f"test set '{name}' must be a file of records, got {file!r}")
        return {str(name): file for name, file in test.items()}

    @field_validator("test_metrics")
    @classmethod
    def _scored_together(cls, metrics: list[str], others: ValidationInfo) -> list[str]:
        kinds = {takes_losses(metric) for metric in metrics}
        if len(kinds) == 2:
            raise ValueError(
                "perplexity scores the given answers, the others generated ones; leave out one or the other"
            )
        twice = sorted({metric for metric in metrics if metrics.count(metric) > 1})
        if twice:
            raise ValueError(f"given twice: {', '.join(twice)}")
        if metrics and others.data.get("test", "not valid") is None:
            raise ValueError("there is no 'test' to score with them")
        return metrics

    @model_validator(mode="after")
    def _balanced_tasks_are_scored(self) -> TaskConfig:
        if not self.auxiliary and (self.metric is None or self.validation is None):
            raise ValueError(
                f"task '{self.name}' is balanced, so it needs 'metric' and 'validation'; "
                "a task without a metric can be 'auxiliary: true' (weight 1, outside balancing)"
            )
        return self


class BuiltInTasksConfig(Options):
    """Sizes of the built-in tasks: conversations in training, questions in validation and test."""

    train: Annotated[int, Field(ge=8)] = Field(1000, description="conversations per task")
    validation: Annotated[int, Field(ge=2)] = Field(150, description="questions per task")
    test: Annotated[int, Field(ge=2)] = Field(300, description="questions per task")
