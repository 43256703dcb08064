"""A text-only training of milliseconds per step, for the tests of balancing inside the training loop.

Three tasks, the last one auxiliary; one sequence belongs to one task. Runs in this process, without DeepSpeed unless
its configuration is given.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from cotbal_kernels.huggingface import apply_fused_loss
from trainer.balancing.method import MethodContext
from trainer.balancing.registry import method_class, read_options
from trainer.loop.checkpoints import COMPLETE, CompleteCheckpoints
from trainer.loop.trainer import TaskWeightedTrainer
from trainer.loop.validation import ValidationBatches
from trainer.loop.weighting import Tasks, TaskWeighting

NAMES = ["sums", "names", "chat"]
BALANCED = [True, True, False]
VOCABULARY, WIDTH, LENGTH = 29, 16, 7
FIXED = torch.tensor([1.25, 0.75])

# Methods whose weights move, and options that make them move within a few steps.
MOVING: dict[str, dict[str, Any]] = {
    "rlw": {}, "dwa": {"window": 1}, "igbv1": {"base_start": 1, "base_steps": 1}, "gradnorm": {}, "lbtw": {},
    "famo": {}, "gradnorm_star": {}, "lbtw_star": {}, "famo_star": {}, "coba": {"warmup": 1, "window": 3},
}  # fmt: skip
# Of these, one for every way in which the loop measures something over ranks.
OVER_RANKS = ("rlw", "lbtw", "gradnorm", "famo", "gradnorm_star")


def samples(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Sequences of the three tasks in turn, half of whose positions are supervised; each task has its own tokens."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for number in range(count):
        task = number % 3
        tokens = torch.randint(9 * task, 9 * task + 9, (LENGTH,), generator=generator)
        labels = torch.where(torch.arange(LENGTH) < 2 + task, -100, tokens)
        out.append({"input_ids": tokens, "labels": labels, "loss_task_ids": torch.tensor(task)})
    return out


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def collate_all(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=16,
        )
    )  # fmt: skip


def validation_batches(per_task: int = 2, rank: int = 0, world: int = 1, ahead: bool = False) -> ValidationBatches:
    held_out = samples(24, seed=2)
    by_task = [[row for row in held_out if row["loss_task_ids"] == k] for k in (0, 1)]
    return ValidationBatches(
        [len(rows) for rows in by_task],
        lambda task, record: by_task[task][record],
        collate,  # type: ignore[arg-type]
        per_task=per_task,
        batch_size=3,
        seed=0,
        rank=rank,
        world=world,
        ahead=ahead,
    )


def make_trainer(
    name: str,
    output: Path,
    options: dict[str, Any] | None = None,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    **training: Any,
) -> TaskWeightedTrainer:
    """A trainer of six steps (by default) of two micro-batches of four with the method `name`."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    interval = training.pop("interval", 1)
    folder = training.pop("model", None)
    validation = validation_batches(rank=rank, world=world)
    chosen = method_class(name)
    context = MethodContext(
        num_tasks=2,
        device=torch.device("cpu"),
        seed=3,
        validation_batches=validation.batches_per_pass if chosen.needs.validation else 0,
        fixed_weights=FIXED,
    )
    output.mkdir(parents=True, exist_ok=True)
    weighting = TaskWeighting(
        chosen(context, read_options(name, options)),
        Tasks(NAMES, BALANCED),
        validation if chosen.needs.validation else None,
        interval,
        output / "weights.csv",
    )
    settings: dict[str, Any] = {
        "output_dir": str(output / "checkpoints"), "use_cpu": True, "per_device_train_batch_size": 4 // world,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 6,
        "save_steps": 2, "save_total_limit": 2, "logging_steps": 1, "report_to": [], "disable_tqdm": True,
        "remove_unused_columns": False, "average_tokens_across_devices": True, "max_grad_norm": 0.0,
    }  # fmt: skip
    args = TrainingArguments(**settings | training)  # before the model, which ZeRO-3 shards as it is loaded
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) if folder else tiny_model()
    aggregation = "token" if weighting.method.options.aggregation == "token" else "task"
    apply_fused_loss(model, num_tasks=3, aggregation=aggregation)
    return TaskWeightedTrainer(
        weighting=weighting,
        model=model,
        args=args,
        train_dataset=samples(24, seed=1),
        data_collator=collate,
        callbacks=[CompleteCheckpoints(), *callbacks],
    )


def resume(name: str, output: Path, options: dict[str, Any] | None = None, **training: Any) -> TaskWeightedTrainer:
    """Goes on from the newest complete checkpoint, as a new process would."""
    trainer = make_trainer(name, output, options, **training)
    done = [path for path in (output / "checkpoints").glob("checkpoint-*") if (path / COMPLETE).exists()]
    newest = max(done, key=lambda path: int(path.name.split("-")[1]))
    trainer.weighting.load(newest)
    trainer.train(resume_from_checkpoint=str(newest))
    return trainer


def read_csv(output: Path) -> list[list[float]]:
    """Rows of ``weights.csv``: step and the weights of the three tasks."""
    with (output / "weights.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["step", *NAMES]
    return [[float(value) for value in row] for row in rows]
