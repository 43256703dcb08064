"""What a training leaves behind while it runs, ``log.jsonl``, and when it ends by itself."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.errors import UserError
from trainer.files import known, write_whole

_OF_A_TASK = ("loss", "tokens", "weight", "validation_loss")


class RunLog(TrainerCallback):
    """``log.jsonl``: one line per logged step, continued after a resume without a gap or a repeated step.

    JSON has no NaN and no infinity: a loss or a norm that is not finite is null.
    """

    def __init__(self, path: Path, task_names: list[str]) -> None:
        self.path = path
        self.task_names = task_names
        self._started = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in map(_parsed, lines) if line and line["step"] <= state.global_step]
        write_whole(self.path, "".join(map(_line, kept)))
        self._started = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:  # the last line, wherever logging_steps would end
            control.should_log = True

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
        of_tasks = {
            name: {key: logs[f"task_{key}/{name}"] for key in _OF_A_TASK if f"task_{key}/{name}" in logs}
            for name in self.task_names
        }
        line["tasks"] = {name: own for name, own in of_tasks.items() if own}  # one may have been validated only
        with self.path.open("a") as file:
            file.write(_line(line))


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
            raise diverged(f"its loss is {loss}", state)


def diverged(sign: str, state: TrainerState) -> UserError:
    """What to tell the user of a training whose numbers are none any more, which `sign` shows."""
    return UserError(
        f"the training has diverged: {sign} at step {state.global_step} of {state.max_steps}; "
        "lower training.learning_rate, or look for the task whose loss grew first in log.jsonl"
    )


def _line(content: dict[str, Any]) -> str:
    return json.dumps(_with_nulls(content), allow_nan=False) + "\n"


def _with_nulls(value: Any) -> Any:
    """Nested values with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _with_nulls(inner) for key, inner in value.items()}
    return known(value) if isinstance(value, float) else value


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the process was killed while it wrote this line
        return None
