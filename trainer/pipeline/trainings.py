"""Which models Algorithm 1 and its comparisons train, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainer.balancing.method import Needs
from trainer.balancing.registry import SINGLE_TASK, is_cotbal, method_class, read_options
from trainer.config import CotbalConfig, RunConfig
from trainer.data.mixtures import Mixture, optimizer_steps, select
from trainer.data.packing import pack
from trainer.errors import listed
from trainer.loop.validation import INITIAL_RECORDS
from trainer.pipeline.planned_data import PlannedData
from trainer.task_config import TaskConfig

FEW_STEPS = 10  # fewer leave a model close to the initial one, and its scores say little about the task


@dataclass(frozen=True)
class Training:
    """One training of the run.

    Attributes:
        name: of its folders and stages; a repetition with another seed ends in ``@1``, ``@2``, ...
        mixture: what it sees.
        splits: what it is scored on: ``validation`` for the equations, ``test`` for the results.
        tasks: what it is scored on.
        method, options: of balancing.
        weights: for CoTBal and its ablations, the name of their weights; else None.
        repetition: 0 for the run's seed, 1 for the next one, ...
    """

    name: str
    mixture: Mixture
    splits: tuple[str, ...]
    tasks: tuple[str, ...]
    method: str = "ew"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    repetition: int = 0


def weight_variants(config: RunConfig) -> dict[str, CotbalConfig]:
    """CoTBal and the ablations among the comparisons: the name of their weights to their Eq. 3-11."""
    variants = {"cotbal": config.cotbal}
    for comparison in config.comparisons:
        if is_cotbal(comparison.method):
            own = read_options(comparison.method, comparison.options).model_dump(exclude_none=True)
            variants[comparison.name] = config.cotbal.model_copy(
                update={key: value for key, value in own.items() if key in CotbalConfig.model_fields}
            )
    return variants


def list_trainings(config: RunConfig, tasks: Sequence[TaskConfig]) -> list[Training]:
    """Every training of a run, proxies first: N + 1 of Algorithm 1, the final one, and the compared ones.

    Proxies are trained once. A final training is repeated for every one of ``config.seeds``.
    """
    balanced = tuple(task.name for task in tasks if not task.auxiliary)
    scored = tuple(task.name for task in tasks if task.name in balanced and task.test)
    methods = {comparison.method for comparison in config.comparisons}
    precise = any(variant.difficulty == "precise" for variant in weight_variants(config).values())

    proxies = [Training("mini", Mixture("mini"), ("validation",), balanced)]
    proxies += [Training(f"plus-{i}", Mixture("plus", i), ("validation",), balanced) for i in balanced]
    if precise:
        proxies += [Training(f"alone-{i}", Mixture("single_mini", i), ("validation",), (i,)) for i in balanced]

    finals = [Training("cotbal", Mixture("all"), ("test",), scored, "cotbal", weights="cotbal")]
    for comparison in config.comparisons:
        if comparison.method != SINGLE_TASK:
            options = config.method_options(comparison)
            weights = comparison.name if is_cotbal(comparison.method) else None
            finals.append(
                Training(comparison.name, Mixture("all"), ("test",), scored, comparison.method, options, weights)
            )
    for i in balanced:  # the full model of a task alone is its STL model: trained once for both
        compared = SINGLE_TASK in methods and i in scored
        splits = (*(("validation",) if precise else ()), *(("test",) if compared else ()))
        if splits:
            finals.append(Training(f"stl-{i}", Mixture("single", i), splits, (i,)))
    repeated = [
        replace(training, name=f"{training.name}@{number}", splits=("test",), repetition=number)
        for training in finals
        if "test" in training.splits
        for number in range(1, config.seeds)
    ]
    return proxies + finals + repeated


def plan(
    config: RunConfig, trainings: Sequence[Training], records: dict[str, int], data: PlannedData | None = None
) -> list[dict[str, Any]]:
    """Every training with its records, optimizer steps and cost in units of the final training (``--dry-run``).

    Args:
        records: training records of every task by name.
        data: their lengths: with them, packed sequences and records that are dropped count as they are in training,
            and rows have sequences (or samples), and tokens, supervised tokens and the images' numbers over all epochs,
            and tokens and images' numbers of the forward passes that the balancing method adds.
    """
    window = config.training.batch_size * config.launch.ranks
    rows: list[dict[str, Any]] = []
    for training in trainings:
        chosen = [
            (name, index)
            for name, total in records.items()
            for index in select(range(total), training.mixture.share(name, config.cotbal.mini_ratio), config.seed, name)
        ]
        row: dict[str, Any] = {"training": training.name, "records": len(chosen)}
        sequences = len(chosen)
        if data is not None:
            kept = [found for found in (data.tasks[name][index] for name, index in chosen) if found.tokens]
            sequences = len(kept)
            if config.training.packing:
                lengths = [found.tokens for found in kept]
                sequences = len(pack(lengths, config.model.max_length, config.seed + training.repetition))
            for key in ("tokens", "supervised", "pixels"):
                row[key] = round(sum(getattr(found, key) for found in kept) * config.training.epochs)
            row["sequences"] = sequences
        steps = optimizer_steps(sequences, window, config.training.epochs, config.training.gradient_accumulation_steps)
        if data is not None:
            needs = method_class(training.method).needs
            tokens, pixels = _validated(config, needs, steps, data)
            again = needs.losses_before + needs.losses_after
            row |= {"forward_tokens": again * row["tokens"] + tokens, "forward_pixels": again * row["pixels"] + pixels}
        rows.append(row | {"steps": steps, "scored on": ", ".join(training.splits)})
    final = next(row["records"] for row in rows if row["training"] == "cotbal")
    for row in rows:
        row["cost"] = row["records"] / final
    return rows


def _validated(config: RunConfig, needs: Needs, steps: int, data: PlannedData) -> tuple[int, int]:
    """Tokens, and the images' numbers, of a training's validation passes; a record counts as the mean training one."""
    if not needs.validation:
        return 0, 0
    options = config.balancing.validation
    updates = 1 + steps // options.interval
    passes = options.samples_per_task * (updates + needs.validation_again * (updates - 1))
    tokens = pixels = 0.0
    for name, records in data.validation.items():
        kept = [found for found in data.tasks[name] if found.tokens]
        own = (passes + needs.initial * min(records, INITIAL_RECORDS)) / max(1, len(kept))
        tokens += own * sum(found.tokens for found in kept)
        pixels += own * sum(found.pixels for found in kept)
    return round(tokens), round(pixels)


def counted_sequences(config: RunConfig, checked: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Training samples of every task from the rows of ``tasks.json``; full sequences stand for packed ones, which makes
    it a lower bound."""
    return {
        row["name"]: math.ceil(row["tokens"] / config.model.max_length)
        if config.training.packing
        else row["train_records"] - row["dropped_records"]
        for row in checked
    }


def few_steps(rows: Sequence[dict[str, Any]]) -> str | None:
    """A warning about the trainings of a plan that have few optimizer steps, the shortest first; None without any."""
    short = sorted((row for row in rows if row["steps"] < FEW_STEPS), key=lambda row: row["steps"])
    if not short:
        return None
    named = listed([f"{row['training']} {row['steps']}" for row in short])
    return (
        f"warning: fewer than {FEW_STEPS} optimizer steps, which teach little: {named}; lower training.batch_size or "
        "training.gradient_accumulation_steps, or raise training.epochs or, for mini, plus-* and alone-*, "
        "cotbal.mini_ratio"
    )


def still_methods(
    config: RunConfig, trainings: Sequence[Training], steps: Sequence[int], validation: Mapping[str, int]
) -> str | None:
    """A warning about methods that never come to weights of their own in as many steps; None without any.

    Args:
        steps: of each of the trainings.
        validation: validation records of every balanced task.
    """
    options = config.balancing.validation
    batches = -(-max(validation.values(), default=0) // options.samples_per_task)
    named = []
    for training, own_steps in zip(trainings, steps, strict=True):
        method, chosen = method_class(training.method), read_options(training.method, training.options)
        equal = method.equal_steps(chosen, batches, options.interval)
        if equal >= own_steps > 0 and not training.repetition:
            named.append(f"{training.name} (the first {equal} steps of {own_steps})")
    if not named:
        return None
    return (
        f"warning: weights that stay equal for the whole training: {listed(named)}; shorten the windows or the warm-up "
        "in balancing.options, or train longer"
    )
