"""Which models Algorithm 1 and its comparisons train, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config import RunConfig, TaskConfig
from trainer.data.mixtures import Mixture, select


@dataclass(frozen=True)
class Training:
    """One training of the run: its mixture, what it is scored on, and how it comes by its weights."""

    name: str
    mixture: Mixture
    split: str
    tasks: tuple[str, ...]
    weighted: bool = False


def list_trainings(tasks: Sequence[TaskConfig], comparisons: Sequence[str]) -> list[Training]:
    """Every training of a run, proxies first: N + 1 of Algorithm 1, the final one, and the compared ones."""
    balanced = tuple(task.name for task in tasks if not task.auxiliary)
    proxies = [Training("mini", Mixture("mini"), "validation", balanced)]
    proxies += [Training(f"plus-{i}", Mixture("plus", i), "validation", balanced) for i in balanced]
    scored = tuple(task.name for task in tasks if task.name in balanced and task.test)
    finals = [Training("cotbal", Mixture("all"), "test", scored, weighted=True)]
    if "ew" in comparisons:
        finals.append(Training("ew", Mixture("all"), "test", scored))
    if "stl" in comparisons:
        finals += [Training(f"stl-{i}", Mixture("single", i), "test", (i,)) for i in scored]
    return proxies + finals


def plan(config: RunConfig, trainings: Sequence[Training], records: dict[str, int]) -> list[dict[str, Any]]:
    """Every training with its records, optimizer steps and cost in units of the final training (``--dry-run``).

    Args:
        records: training records of every task by name.
    """
    window = config.training.batch_size * config.launch.processes
    rows: list[dict[str, Any]] = []
    for training in trainings:
        count = sum(
            len(select(range(total), training.mixture.share(name, config.cotbal.mini_ratio), config.seed, name))
            for name, total in records.items()
        )
        batches = -(-count // window)
        steps = math.ceil(-(-batches // config.training.gradient_accumulation_steps) * config.training.epochs)
        rows.append({"training": training.name, "records": count, "steps": steps, "scored on": training.split})
    final = next(row["records"] for row in rows if row["training"] == "cotbal")
    for row in rows:
        row["cost"] = row["records"] / final
    return rows
