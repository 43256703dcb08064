"""CPU time of an optimizer step with every balancing method, as a ratio to the same step without balancing.

    python tests/trainer/balancing_cost.py [STEPS]

A language model of 4 layers x 256 with a vocabulary of 8192; 16 sequences of 128 tokens of 8 tasks per step, an
eighth of the positions supervised, as in visual instruction data; one validation sequence per task where a method asks
for them.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import collate
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

import trainer.loop.weighting as loop
from cotbal_kernels.huggingface import apply_fused_loss
from trainer.balancing.method import MethodContext, Needs
from trainer.balancing.registry import METHODS, method_class, read_options
from trainer.loop.measuring import HeadTap
from trainer.loop.trainer import TaskWeightedTrainer
from trainer.loop.validation import ValidationBatches
from trainer.loop.weighting import Tasks, TaskWeighting

TASKS, LENGTH, BATCH, VOCABULARY = 8, 128, 16, 8192
WARM_UP = 2


class Clock(TrainerCallback):
    """CPU time of every step, and how much of it went into what the method asked for.

    Both are taken from the same steps, so that other work on the machine slows them alike.
    """

    def __init__(self) -> None:
        self.starts: list[tuple[float, float]] = []
        self.asked_for = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.starts.append((time.process_time(), self.asked_for))

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            before = self.asked_for
            result = call(*args, **kwargs)
            self.asked_for = before + time.process_time() - start  # calls inside this one are in it
            return result

        return timed_call

    def ratio(self) -> float:
        """Median over steps of the whole step to the step without what was asked for."""
        steps = [(end[0] - start[0], end[1] - start[1]) for start, end in pairwise(self.starts[WARM_UP:])]
        return statistics.median(whole / (whole - asked) for whole, asked in steps)


def samples(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    out = []
    for number in range(count):
        tokens = torch.randint(0, VOCABULARY, (LENGTH,), generator=generator)
        labels = torch.where(torch.arange(LENGTH) < LENGTH * 7 // 8, -100, tokens)
        out.append({"input_ids": tokens, "labels": labels, "loss_task_ids": torch.tensor(number % TASKS)})
    return out


def cost(name: str, steps: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
                    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH)
    )  # fmt: skip
    held_out = samples(4 * TASKS)
    validation = ValidationBatches(
        [4] * TASKS, lambda task, record: held_out[record * TASKS + task], collate, per_task=1, batch_size=BATCH, seed=0
    )  # fmt: skip
    context = MethodContext(TASKS, torch.device("cpu"), 0, validation.batches_per_pass, torch.ones(TASKS))
    method = method_class(name)(context, read_options(name))
    tasks = Tasks([f"task {k}" for k in range(TASKS)], [True] * TASKS)
    weighting = TaskWeighting(method, tasks, validation, 1, folder / "weights.csv")
    apply_fused_loss(model, num_tasks=TASKS, aggregation="token" if method.options.aggregation == "token" else "task")
    clock = Clock()
    for place, part in ((loop, "forward_only"), (loop, "summed"), (HeadTap, "norms"), (HeadTap, "_keep")):
        monkeypatch.setattr(place, part, clock.timed(getattr(place, part)))
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=BATCH, max_steps=steps + WARM_UP + 1,
        save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    trainer = TaskWeightedTrainer(
        weighting=weighting, model=model, args=args, train_dataset=samples(BATCH * (steps + WARM_UP + 1)),
        data_collator=collate, callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    return clock.ratio()


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    for name in METHODS:
        if method_class(name).needs != Needs():
            with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
                print(f"{name:<16}{cost(name, steps, Path(folder), monkeypatch):6.2f}", flush=True)


if __name__ == "__main__":
    main()
