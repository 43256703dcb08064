"""``log.jsonl`` of a training: its lines, its rates, and a loss that is no number; checkpoints between others."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import NAMES, make_trainer, read_csv, resume
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.errors import UserError
from trainer.loop.callbacks import RunLog
from trainer.loop.checkpoints import COMPLETE, CompleteCheckpoints, SaveWhenAsked
from trainer.loop.learning_rates import set_own_rates
from trainer.loop.weighting import STATE_FILE


def strict(text: str) -> list[Any]:
    """Lines read by a parser that knows JSON and nothing else."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null(tmp_path: Path, number: float) -> None:
    path = tmp_path / "log.jsonl"
    lines = [
        '{"step": 1, "steps": 9, "loss": NaN, "grad_norm": null, "seconds": 2.0}',  # of an earlier version
        '{"step": 2, "steps": 9, "loss": 1.0, "seconds": 3.0}',  # comes again
        '{"step": 3, "ste',  # cut off
    ]
    path.write_text("\n".join(lines))
    arguments, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(global_step=1, max_steps=9, is_world_process_zero=True)
    log = RunLog(path, ["a", "b", "c"])
    log.on_train_begin(arguments, state, control)
    state.global_step = 2
    logs = {"loss": number, "grad_norm": number, "learning_rate": 0.5, "epoch": 0.25}
    logs |= {"task_loss/a": number, "task_tokens/a": 3, "task_weight/a": 1.5, "task_validation_loss/b": 0.5}
    log.on_log(arguments, state, control, logs)
    first, second = strict(path.read_text())
    assert first == {"step": 1, "steps": 9, "loss": None, "grad_norm": None, "seconds": 2.0}
    assert 2.0 <= second.pop("seconds") < 100.0
    assert second == {
        "step": 2, "steps": 9, "epoch": 0.25, "loss": None, "learning_rate": 0.5, "grad_norm": None,
        "tasks": {"a": {"loss": None, "tokens": 3, "weight": 1.5}, "b": {"validation_loss": 0.5}},
    }  # fmt: skip


def log_of_a_training(folder: Path, name: str = "ew", **training: Any) -> list[dict[str, Any]]:
    path = folder / "log.jsonl"
    make_trainer(name, folder, callbacks=[RunLog(path, NAMES)], **training).train()
    return strict(path.read_text())


def test_the_last_step_is_logged(tmp_path: Path) -> None:
    """With the mean loss of the steps since the line before."""
    every = log_of_a_training(tmp_path / "every", max_steps=6)
    some = log_of_a_training(tmp_path / "some", max_steps=6, logging_steps=4)
    assert [line["step"] for line in some] == [4, 6]
    assert some[-1]["loss"] == pytest.approx((every[4]["loss"] + every[5]["loss"]) / 2, rel=1e-5)


def test_a_line_has_the_weights_that_its_step_used(tmp_path: Path) -> None:
    """Not those that validation records are measured with after the step."""
    lines = log_of_a_training(tmp_path, "lbtw_star", max_steps=4, learning_rate=0.1)
    used = {int(step): dict(zip(NAMES, weights, strict=True)) for step, *weights in read_csv(tmp_path)}
    for line in lines:
        logged = {name: own["weight"] for name, own in line["tasks"].items() if "weight" in own}
        assert logged == pytest.approx({name: used[line["step"]][name] for name in logged})
    assert len(lines) == 4
    assert abs(used[4]["sums"] - 1) > 1e-3


@pytest.mark.parametrize(
    ("steps", "share", "warmup"), [(1, 0.03, 0), (2, 0.03, 0), (4, 0.24, 0), (4, 0.25, 1), (5, 0.3, 2), (3, 0.0, 0)]
)
def test_a_warm_up_of_less_than_a_step_is_none(tmp_path: Path, steps: int, share: float, warmup: int) -> None:
    """No step of a short training is lost to rate 0: above all not the only one."""
    lines = log_of_a_training(
        tmp_path, max_steps=steps, lr_scheduler_type="cosine", warmup_steps=share, learning_rate=0.5
    )
    expected = [
        step / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))
        for step in range(steps)
    ]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.5 * rate for rate in expected], abs=1e-12)


def test_parts_have_rates_of_their_own() -> None:
    """Every other option of a group stays, and the rate that is logged, of the first group, is the general one."""
    model = torch.nn.ModuleDict({"own": torch.nn.Linear(2, 2), "rest": torch.nn.Linear(2, 2)})
    own, rest = model["own"], model["rest"]
    groups = [
        {"params": [own.weight, rest.weight], "weight_decay": 0.125},
        {"params": [own.bias, rest.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.5)
    set_own_rates(optimizer, model, {"own.": 0.25})
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    expected = [(own.weight, 0.25, 0.125), (own.bias, 0.25, 0.0), (rest.weight, 0.5, 0.125), (rest.bias, 0.5, 0.0)]
    assert found == {id(parameter): (rate, decay) for parameter, rate, decay in expected}
    assert optimizer.param_groups[0]["lr"] == 0.5
    rest.requires_grad_(False)
    with pytest.raises(UserError, match=r"no parameter that is trained has 'rest\.' in its name"):
        set_own_rates(optimizer, model, {"rest.": 0.25})


def test_a_checkpoint_is_saved_when_it_is_asked_for(tmp_path: Path) -> None:
    """At the next step that is logged, once, and the training goes on."""

    class AskAt3(TrainerCallback):
        def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                (tmp_path / "now").touch()

    asking = [AskAt3(), SaveWhenAsked(tmp_path / "now")]
    trainer = make_trainer("ew", tmp_path, callbacks=asking, max_steps=9, logging_steps=4, save_steps=100)
    trainer.train()
    found = {path.parent.name for path in (tmp_path / "checkpoints").glob(f"*/{COMPLETE}")}
    assert found == {"checkpoint-4", "checkpoint-9"}
    assert trainer.state.global_step == 9


def test_a_checkpoint_has_the_method_s_state_before_it_is_complete(tmp_path: Path) -> None:
    """Whoever kills the training in between."""
    found = []

    class Look(TrainerCallback):
        def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
            found.append((tmp_path / "checkpoints" / f"checkpoint-{state.global_step}" / STATE_FILE).is_file())

    make_trainer("ew", tmp_path, callbacks=[Look()], max_steps=2).train()
    assert found == [True]


@pytest.mark.parametrize("asked", [0, 1])
def test_a_rank_saves_when_rank_0_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int) -> None:
    """Whatever it sees of the file itself, which is rank 0's to take away."""
    path = tmp_path / "now"
    path.touch()

    def broadcast(value: torch.Tensor, src: int) -> None:
        assert (value.item(), src) == (0, 0)
        value.fill_(asked)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, logging_steps=2)
    state, control = TrainerState(global_step=4, is_world_process_zero=False), TrainerControl()
    SaveWhenAsked(path).on_step_end(arguments, state, control)
    assert control.should_save == bool(asked)
    assert path.exists()


@pytest.mark.parametrize("first", [True, False])
def test_ranks_meet_around_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    """All have written before a machine's first rank sees to its files, and rank 0 marks what all machines have."""
    events: list[str] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: events.append("meet"))
    monkeypatch.setattr("trainer.loop.checkpoints.force_to_disk", lambda path: events.append("force"))
    monkeypatch.setattr(Path, "touch", lambda path: events.append(path.name))
    state = TrainerState(global_step=8, is_world_process_zero=first, is_local_process_zero=first)
    CompleteCheckpoints().on_save(TrainingArguments(str(tmp_path), use_cpu=True), state, TrainerControl())
    assert events == (["meet", "force", "meet", COMPLETE] if first else ["meet", "meet"])


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_a_training_that_goes_on_from_its_last_checkpoint_has_no_step_left(tmp_path: Path) -> None:
    """Killed while it wrote its model. One and a half epochs of 3 steps end within the second."""
    whole = {"max_steps": -1, "num_train_epochs": 1.5, "save_steps": 5}
    log = [RunLog(tmp_path / "log.jsonl", NAMES)]
    first = make_trainer("rlw", tmp_path, callbacks=log, **whole)
    first.train()
    written = [(tmp_path / name).read_bytes() for name in ("log.jsonl", "weights.csv")]
    assert len(read_csv(tmp_path)) == 5
    second = resume("rlw", tmp_path, callbacks=log, **whole)
    assert second.state.global_step == 5
    assert [(tmp_path / name).read_bytes() for name in ("log.jsonl", "weights.csv")] == written
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_a_training_goes_on_with_smaller_micro_batches(tmp_path: Path) -> None:
    """What a step has of samples stays: 2 x 4 as 4 x 2. 1e-6: sums of a step in another order, in float32."""
    sgd = {"optim": "sgd", "learning_rate": 0.5}
    whole = make_trainer("famo_star", tmp_path / "whole", **sgd)
    whole.train()
    make_trainer("famo_star", tmp_path / "cut", callbacks=[StopAt(4)], **sgd).train()
    smaller = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    resumed = resume("famo_star", tmp_path / "cut", **sgd, **smaller)
    assert resumed.state.global_step == 6
    for name, value in whole.model.state_dict().items():
        assert float((resumed.model.state_dict()[name] - value).abs().max()) < 1e-6, name
    assert read_csv(tmp_path / "cut") == [pytest.approx(row, abs=1e-6) for row in read_csv(tmp_path / "whole")]
