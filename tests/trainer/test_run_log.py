"""``log.jsonl`` of a training whose loss is no number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from trainer.loop.callbacks import RunLog


def strict(text: str) -> list[Any]:
    """Lines read by a parser that knows JSON and nothing else."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null(tmp_path: Path, number: float) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "steps": 9, "loss": NaN, "seconds": 2.0}\n')  # of an earlier version
    arguments, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(global_step=1, max_steps=9, is_world_process_zero=True)
    log = RunLog(path, ["a", "b"])
    log.on_train_begin(arguments, state, control)
    state.global_step = 2
    logs = {"loss": number, "grad_norm": number, "learning_rate": 0.5, "epoch": 0.25}
    logs |= {"task_loss/a": number, "task_tokens/a": 3, "task_weight/a": 1.5}
    log.on_log(arguments, state, control, logs)
    first, second = strict(path.read_text())
    assert first == {"step": 1, "steps": 9, "loss": None, "seconds": 2.0}
    assert second.pop("seconds") >= 2.0
    assert second == {
        "step": 2, "steps": 9, "epoch": 0.25, "loss": None, "learning_rate": 0.5, "grad_norm": None,
        "tasks": {"a": {"loss": None, "tokens": 3, "weight": 1.5}},
    }  # fmt: skip
