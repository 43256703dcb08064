"""Methods inside the training loop: what they are told is true of the step, on one rank and on two, and survives."""

from __future__ import annotations

import io
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from balancing_worker import on_rank
from ranks import run_on_ranks
from tiny_training import (
    FIXED,
    MOVING,
    NAMES,
    OVER_RANKS,
    VOCABULARY,
    collate,
    collate_all,
    make_trainer,
    read_csv,
    resume,
    samples,
    tiny_model,
    validation_batches,
)

from cotbal_kernels.huggingface import set_task_weights
from trainer.balancing.method import StepReport, TaskLosses
from trainer.balancing.registry import METHODS, is_cotbal
from trainer.errors import UserError
from trainer.loop.checkpoints import COMPLETE
from trainer.loop.measuring import forward_only, summed
from trainer.loop.validation import ValidationBatches

# float32 sums in another order, carried through a few steps.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def oracle(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> TaskLosses:
    """Sums, tokens and head gradient norms of both balanced tasks: a backward pass per task, unpatched loss."""
    sums, tokens, norms = [], [], []
    for task in (0, 1):
        model.zero_grad()
        hidden = model.model(batch["input_ids"]).last_hidden_state[:, :-1]  # type: ignore[operator, union-attr]
        logits = F.linear(hidden, model.lm_head.weight)  # type: ignore[union-attr, arg-type]
        targets = batch["labels"][:, 1:].masked_fill((batch["loss_task_ids"] != task)[:, None], -100)
        total = F.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1), reduction="sum")
        count = (targets != -100).sum()
        (total / count).backward()
        sums.append(total.detach().double())
        tokens.append(count.double())
        norms.append(model.lm_head.weight.grad.norm().double())  # type: ignore[union-attr]
    model.zero_grad()
    return TaskLosses(torch.stack(sums), torch.stack(tokens), torch.stack(norms))


class Spy:
    """Records what a method is told, with the model's parameters at that moment."""

    def __init__(self, trainer: Any) -> None:
        self.before: list[TaskLosses | None] = []
        self.steps: list[StepReport] = []
        self.started: list[TaskLosses] = []
        self.validated: list[tuple[TaskLosses, TaskLosses | None]] = []
        self.parameters: list[dict[str, torch.Tensor]] = []
        method, model = trainer.weighting.method, trainer.model
        before, after, started, validated = method.before_step, method.after_step, method.started, method.validated

        def note_before(losses: TaskLosses | None) -> None:
            self.before.append(losses)
            self.parameters.append({name: value.clone() for name, value in model.state_dict().items()})
            before(losses)

        def note_after(report: StepReport) -> None:
            self.steps.append(report)
            after(report)

        def note_started(initial: TaskLosses) -> None:
            self.started.append(initial)
            started(initial)

        def note_validated(new: TaskLosses, again: TaskLosses | None) -> None:
            self.validated.append((new, again))
            validated(new, again)

        method.before_step, method.after_step = note_before, note_after
        method.started, method.validated = note_started, note_validated


def same(found: TaskLosses | None, expected: TaskLosses, norms: bool = False) -> None:
    assert found is not None
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.loss_sum, expected.loss_sum, **CLOSE)
    if norms:
        torch.testing.assert_close(found.gradient_norms, expected.gradient_norms, **CLOSE)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_mode_of_a_model(tmp_path: Path, training: bool) -> None:
    """It measures without dropout and without a graph."""
    trainer = make_trainer("ew", tmp_path)
    model = trainer.model_wrapped.train(training)
    modes = []
    model.register_forward_pre_hook(lambda module, _: modes.append((module.training, torch.is_grad_enabled())))
    batch = collate(samples(3, seed=1))
    set_task_weights(trainer.model, [0.0, 1.0, 0.0])  # tasks whose loss a step would skip are measured too
    found = forward_only(trainer, [batch], len(NAMES))
    torch.testing.assert_close(found.loss_sum[:2], oracle(tiny_model(), batch).loss_sum, **CLOSE)
    assert modes == [(False, False)]
    assert [module.training for module in model.modules()] == [training] * len(list(model.modules()))


def test_norms_are_of_the_mean_loss_of_a_task() -> None:
    """One token is enough; a task without any has none."""
    found = summed(torch.tensor([[2.0, 0.0, 5.0], [1, 0, 4]]), torch.tensor([3.0, 0.0, 6.0]))
    assert found.gradient_norms is not None
    assert found.gradient_norms.tolist() == [3.0, 0.0, 1.5]


def model_with(parameters: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = tiny_model()
    model.load_state_dict(parameters)
    return model


def windows(trainer: Any) -> list[dict[str, torch.Tensor]]:
    """The batch of every step, both micro-batches together, in the order of the trainer's own sampler."""
    loader = trainer.get_train_dataloader()
    batches = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches += list(loader)
    return [
        {key: torch.cat([batches[i][key], batches[i + 1][key]]) for key in batches[i]}
        for i in range(0, len(batches), 2)
    ]


def test_gradnorm_sees_losses_and_norms_of_the_whole_step(tmp_path: Path) -> None:
    trainer = make_trainer("gradnorm", tmp_path)
    spy = Spy(trainer)
    trainer.train()
    for report, parameters, batch in zip(spy.steps, spy.parameters, windows(trainer), strict=True):
        same(report.losses, oracle(model_with(parameters), batch), norms=True)
        assert report.losses_after is None  # what nobody asks for is not measured
    assert spy.before == [None] * 6
    assert [report.step for report in spy.steps] == [1, 2, 3, 4, 5, 6]
    assert [report.epoch for report in spy.steps] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])


def test_famo_sees_the_batch_before_and_after_the_step(tmp_path: Path) -> None:
    trainer = make_trainer("famo", tmp_path)
    spy = Spy(trainer)
    trainer.train()
    final = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for t, (report, batch) in enumerate(zip(spy.steps, windows(trainer), strict=True)):
        before = oracle(model_with(spy.parameters[t]), batch)
        same(spy.before[t], before)
        same(report.losses, before)
        assert report.losses.gradient_norms is None
        same(report.losses_after, oracle(model_with([*spy.parameters, final][t + 1]), batch))
        assert report.losses_after is not None
        assert not torch.equal(report.losses_after.loss_sum, report.losses.loss_sum)


@pytest.mark.parametrize("name", ["gradnorm_star", "famo_star"])
def test_validation_batches_are_measured_at_their_steps(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Update u happens before step 2 u + 1 with an interval of 2; the previous batch is measured again when asked.

    L(0) is of all eight records of each task, which are the first four updates. Each of two lines of the log has the
    mean of two updates.
    """
    trainer = make_trainer(name, tmp_path, interval=2, logging_steps=3)
    closed: list[ValidationBatches] = []
    monkeypatch.setattr(ValidationBatches, "close", lambda batches: closed.append(batches))
    spy = Spy(trainer)
    trainer.train()
    assert closed == [trainer.weighting._validation]  # a process that makes batches ends with the training
    final = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    batches = [collate_all(validation_batches()(u)) for u in range(4)]
    assert len(spy.validated) == 4
    assert len(spy.started) == (name == "gradnorm_star")
    for initial in spy.started:
        whole = oracle(model_with(spy.parameters[0]), collate_all(batches))
        same(initial, whole)
        torch.testing.assert_close(trainer.weighting.method.first, whole.loss_sum / whole.tokens, **CLOSE)  # type: ignore[attr-defined]
    expected = []
    for u, (new, again) in enumerate(spy.validated):
        model = model_with([*spy.parameters, final][2 * u])
        expected.append(oracle(model, batches[u]))
        same(new, expected[u], norms=name == "gradnorm_star")
        if name == "famo_star" and u:
            same(again, oracle(model, batches[u - 1]))
        else:
            assert again is None
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for line, (first, second) in zip(lines, (expected[:2], expected[2:]), strict=True):
        means = (first.loss_sum + second.loss_sum) / (first.tokens + second.tokens)
        found = {key: value for key, value in line.items() if key.startswith("task_validation_loss/")}
        assert found == pytest.approx(
            {f"task_validation_loss/{task}": mean for task, mean in zip(NAMES, means.tolist(), strict=False)}, rel=1e-5
        )
    weights = [row[1:3] for row in read_csv(tmp_path)]
    assert weights[0] == weights[1] != weights[2] == weights[3] != weights[4] == weights[5]


@pytest.mark.parametrize("aggregation", ["token", "task", "task_sum"])
def test_the_step_descends_the_stated_aggregation(aggregation: str, tmp_path: Path) -> None:
    """Loss of the first step, and the parameters after it, against the formula on the unpatched model; SGD."""
    trainer = make_trainer(
        "cotbal", tmp_path, {"aggregation": aggregation}, max_steps=1, optim="sgd", learning_rate=0.5
    )
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    (batch, *_) = windows(trainer)
    if aggregation != "token":  # a step without the second task shows how an absent one counts
        absent = batch["loss_task_ids"] == 1
        trainer.train_dataset = [row for row in samples(24, seed=1) if row["loss_task_ids"] != 1]  # type: ignore[assignment]
        (batch, *_) = windows(trainer)
        assert absent.any()
        assert not (batch["loss_task_ids"] == 1).any()
    trainer.train()
    model = model_with(before)
    lam = torch.cat([FIXED, torch.ones(1)])
    logits = model(batch["input_ids"]).logits[:, :-1]
    entropy = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none", ignore_index=-100)
    supervised = batch["labels"][:, 1:] != -100
    S = torch.stack([entropy[batch["loss_task_ids"] == k].sum() for k in range(3)])
    T = torch.stack([supervised[batch["loss_task_ids"] == k].sum() for k in range(3)])
    if aggregation == "token":
        loss = (lam * S).sum() / (lam * T).sum()
    else:
        present = T > 0
        scale = lam[present].sum() if aggregation == "task" else lam.sum()
        loss = (lam[present] * S[present] / T[present]).sum() / scale
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)  # logged with four decimals
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - 0.5 * parameter.grad
        torch.testing.assert_close(trainer.model.state_dict()[name], expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of trainings that were killed with SIGKILL after step 5, by method."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, str(Path(__file__).with_name("killed_worker.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("name", MOVING)
def test_a_killed_training_has_the_weights_of_an_uninterrupted_one(name: str, killed: Path, tmp_path: Path) -> None:
    """Killed after step 5, continued here from the checkpoint of step 4: bitwise the same trajectory and model."""
    options = MOVING[name]
    whole = make_trainer(name, tmp_path / "whole", options)
    whole.train()
    expected = read_csv(tmp_path / "whole")
    assert [row[0] for row in expected] == [1, 2, 3, 4, 5, 6]
    assert len({tuple(row[1:]) for row in expected}) >= 4, "a trajectory that does not move shows nothing"
    assert len(read_csv(killed / name)) >= 4, "the killed training left less than its checkpoint"
    with (killed / name / "weights.csv").open("a") as file:
        file.write("1")  # what a kill may leave of a row of step 10 or later
    resumed = resume(name, killed / name, options)
    assert read_csv(killed / name) == expected
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    logged = [line["task_weight/names"] for line in whole.state.log_history if "task_weight/names" in line]
    assert logged == [row[2] for row in expected]


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    make_trainer("lbtw", tmp_path, max_steps=2).train()
    (checkpoint,) = (tmp_path / "checkpoints").glob("checkpoint-*")
    with pytest.raises(UserError, match="of the method 'lbtw', not of 'lbtw_star'; go on with that one, or delete"):
        make_trainer("lbtw_star", tmp_path).weighting.load(checkpoint)
    # Older versions wrote no name.
    content = torch.load(checkpoint / "balancing.pt", weights_only=True)
    assert content.pop("name") == "lbtw"
    torch.save(content, checkpoint / "balancing.pt")
    make_trainer("lbtw", tmp_path).weighting.load(checkpoint)
    with pytest.raises(UserError, match="belongs to another method or other options"):
        make_trainer("gradnorm", tmp_path).weighting.load(checkpoint)
    other = make_trainer("coba", tmp_path, {"window": 5}).weighting.method.state_dict()
    torch.save({"method": other, "updates": 0}, checkpoint / "balancing.pt")
    with pytest.raises(UserError, match=r"another method or other options \(state must come from .* window=4, got"):
        make_trainer("coba", tmp_path, {"window": 4}).weighting.load(checkpoint)
    (checkpoint / "balancing.pt").unlink()
    with pytest.raises(UserError, match="without the state of a balancing method; delete"):
        make_trainer("lbtw", tmp_path).weighting.load(checkpoint)


@pytest.mark.parametrize("name", ["dwa", "famo_star"])
def test_losses_that_are_no_numbers_are_called_divergence(name: str, tmp_path: Path) -> None:
    """They reach the weights before they are logged."""
    trainer = make_trainer(name, tmp_path, MOVING[name], learning_rate=1e30, logging_steps=100)
    with pytest.raises(UserError, match=r"has diverged: the weights are \[nan, nan, 1.0\] at step \d of 6; lower"):
        trainer.train()


@pytest.mark.slow
def test_two_ranks_under_zero_3_have_equal_weights_and_those_of_one(tmp_path: Path) -> None:
    """Batches of 2 on two ranks with a sharded model against batches of 4 in one process: the same samples in a step,
    so the same losses, gradient norms, weights and model. They would go on from one checkpoint, which rank 0 sees."""
    tiny_model().save_pretrained(tmp_path / "model")
    checkpoint = tmp_path / "seen by 0" / "checkpoints" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    for name in (COMPLETE, "rng_state_0.pth", "rng_state_1.pth"):
        (checkpoint / name).touch()
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    (zero, seen_by_0), (one, seen_by_1) = run_on_ranks(partial(on_rank, str(tmp_path / "model"), tmp_path), 2, ranks)
    assert seen_by_0 == seen_by_1 == str(checkpoint)
    for name in OVER_RANKS:
        assert torch.equal(zero[name][0], one[name][0]), f"{name}: ranks disagree"
        trainer = make_trainer(
            name,
            tmp_path / name / "alone",
            MOVING[name],
            save_strategy="no",
            optim="sgd",
            learning_rate=0.5,
            max_steps=3,
        )
        trainer.train()
        expected = torch.tensor(read_csv(tmp_path / name / "alone"))[:, 1:]
        assert (expected - 1).abs().max() > 1e-3, f"{name}: weights that stay at 1 show nothing"
        torch.testing.assert_close(zero[name][0], expected, msg=lambda m, n=name: f"{n}: {m}", **CLOSE)
        torch.testing.assert_close(zero[name][1], trainer.model.lm_head.weight.detach(), **CLOSE)


def test_every_method_that_moves_its_weights_is_tested_here() -> None:
    fixed = {"ew", "tla", "uniform", *(name for name in METHODS if is_cotbal(name))}
    assert set(MOVING) == set(METHODS) - fixed


def test_tiny_model_is_the_same_every_time() -> None:
    first, second = io.BytesIO(), io.BytesIO()
    torch.save(tiny_model().state_dict(), first)
    torch.save(tiny_model().state_dict(), second)
    assert first.getvalue() == second.getvalue()
    assert torch.equal(collate(samples(3, 1))["labels"], collate(samples(3, 1))["labels"])
