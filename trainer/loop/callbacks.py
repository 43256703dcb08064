"""What a training leaves behind while it runs: ``log.jsonl`` and marks on complete checkpoints."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.errors import UserError

COMPLETE = "COMPLETE"  # written last into a checkpoint folder: one without it was cut off


class RunLog(TrainerCallback):
    """``log.jsonl``: one line per logged step, continued after a resume without a gap or a repeated step."""

    def __init__(self, path: Path, task_names: list[str]) -> None:
        self.path = path
        self.task_names = task_names
        self._started = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in map(_parsed, lines) if line and line["step"] <= state.global_step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._started = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        line: dict[str, Any] = {"step": state.global_step, "steps": state.max_steps, "epoch": logs.get("epoch", 0.0)}
        line |= {key: float(logs[key]) for key in ("loss", "learning_rate", "grad_norm") if key in logs}
        line["seconds"] = time.monotonic() - self._started
        line["tasks"] = {
            name: {key: logs[f"task_{key}/{name}"] for key in ("loss", "tokens", "weight")}
            for name in self.task_names
            if f"task_loss/{name}" in logs
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint once every file of it is on disk."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if dist.is_initialized():
            dist.barrier()
        if state.is_world_process_zero:
            assert args.output_dir is not None
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class StopWhenDiverged(TrainerCallback):
    """Ends a training whose loss is no number any more: its weights are none either, and no later step mends them."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise UserError(
                f"the training has diverged: its loss is {loss} at step {state.global_step} of {state.max_steps}; "
                "lower training.learning_rate, or look for the task whose loss grew first in log.jsonl"
            )


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the process was killed while it wrote this line
        return None
