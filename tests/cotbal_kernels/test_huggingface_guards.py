"""What scripts do around a patched model that would lose the task weights, and what frameworks do to its numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")  # Trainer needs it

from hf_models import build, one_thread  # noqa: E402, F401
from test_huggingface_trainer import (  # noqa: E402
    LAM,
    PlainTrainer,
    WeightedTrainer,
    arguments,
    collate,
    parameters,
    records,
    train,
)

from cotbal_kernels import global_normalizer  # noqa: E402
from cotbal_kernels.huggingface import (  # noqa: E402
    TaskWeightedTrainerMixin,
    apply_fused_loss,
    remove_fused_loss,
    set_task_weights,
)
from cotbal_kernels.reference import reference_task_cross_entropy  # noqa: E402


def other_forward(self: Any, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
    """A forward with a loss of its own, as Liger and TRL put in a model's place."""
    hidden = self.model(input_ids).last_hidden_state
    loss = torch.nn.functional.cross_entropy(self.lm_head(hidden).flatten(0, 1), labels.flatten())
    return {"loss": loss}


class TestReplacedForward:
    @pytest.mark.parametrize("copied", [False, True], ids=["patched", "a copy of it"])
    def test_a_pass_around_the_patched_one_is_an_error(self, copied: bool) -> None:
        model = apply_fused_loss(build("llama"), LAM)
        model = copy.deepcopy(model) if copied else model
        batch = collate(records(2))
        model.train()(**batch)
        model.forward = MethodType(other_forward, model)
        with pytest.raises(ValueError, match="forward of a patched LlamaForCausalLM was replaced by test_hugging"):
            model(batch["input_ids"], batch["labels"])
        model.eval()(batch["input_ids"], batch["labels"])  # a benchmark, a merge: not ours to judge

    def test_in_a_plain_trainer_that_replaces_it_in_train(self, tmp_path: Path) -> None:
        class Replacing(PlainTrainer):
            def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
                self.model.forward = MethodType(other_forward, self.model)
                return super()._inner_training_loop(*args, **kwargs)

        model = apply_fused_loss(build("llama"), LAM)
        with pytest.raises(ValueError, match="was replaced by"):
            train(Replacing, model, tmp_path, 2, 1)

    def test_wrappers_and_the_layers_alone_are_none_of_it(self) -> None:
        model = apply_fused_loss(build("llama"), LAM).train()
        batch = collate(records(2))
        expected = apply_fused_loss(build("llama"), LAM)(**batch).loss
        inner = model.forward
        model.forward = lambda *args, **kwargs: inner(*args, **kwargs)  # says nothing of what it wraps
        assert torch.equal(model(**batch).loss, expected)
        model.forward = inner
        model.model(batch["input_ids"])
        remove_fused_loss(model)
        assert not model.model._forward_pre_hooks
        model.forward = MethodType(other_forward, model)
        model(batch["input_ids"], batch["labels"])


class TestMissingTasks:
    def without(self, rows: Any) -> dict[str, Tensor]:
        return {key: value for key, value in collate(rows).items() if key != "loss_task_ids"}

    def test_several_weights_and_no_tasks(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="2 task weights and the batch no loss_task_ids: without them"):
            apply_fused_loss(build("llama"), LAM[:2])(**self.without(records(2)))
        model = apply_fused_loss(build("llama"), LAM)
        with pytest.raises(ValueError, match="no loss_task_ids among attention_mask, input_ids, labels: without them"):
            train(WeightedTrainer, model, tmp_path, 2, 1, self.without)

    def test_one_weight_needs_none(self) -> None:
        model = build("llama")
        batch = self.without(records(3))
        expected = model(**batch).loss
        assert apply_fused_loss(model, [0.3])(**batch).loss.item() == pytest.approx(expected.item(), rel=1e-6)

    def test_no_tensor(self, tmp_path: Path) -> None:
        def listed(rows: Any) -> dict[str, Any]:
            return collate(rows) | {"loss_task_ids": [row["loss_task_ids"] for row in rows]}

        with pytest.raises(ValueError, match="loss_task_ids must be a tensor of integers, got list"):
            train(WeightedTrainer, apply_fused_loss(build("llama"), LAM), tmp_path, 2, 1, listed)


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        ({"loss_task_ids": torch.tensor([0.0, 1.0])}, "loss_task_ids must be integers"),
        ({"loss_task_ids": torch.tensor([0, 3])}, r"loss_task_ids must be in \[0, 3\) where supervised, got 3"),
        ({"num_items_in_batch": torch.tensor(-1.0)}, "num_items_in_batch must be finite and >= 0, got -1.0"),
        ({"labels": torch.full((2, 3), 5)}, r"labels must be \(2, .*to match hidden"),
        ({"shift_labels": torch.full((2, 3), 5)}, r"shift_labels must be \(2, .*to match hidden"),
    ],
)
def test_errors_of_the_loss_name_what_was_passed(passed: dict[str, Tensor], message: str) -> None:
    model = apply_fused_loss(build("llama"), LAM)
    with pytest.raises(ValueError, match=f"^{message}"):
        model(**collate(records(2)) | passed)


@pytest.mark.parametrize(("shifted", "name"), [(False, "loss_task_ids"), (True, "shift_labels")])
def test_errors_of_the_normaliser_name_what_was_passed(shifted: bool, name: str, tmp_path: Path) -> None:
    def wrong(rows: Any) -> dict[str, Tensor]:
        batch = collate(rows)
        if shifted:
            batch["shift_labels"] = batch["labels"]
        return batch | {name: batch[name].float()}

    with pytest.raises(ValueError, match=f"^{name} must be integers"):
        train(WeightedTrainer, apply_fused_loss(build("llama"), LAM), tmp_path, 2, 1, wrong)


def rounded(value: Any) -> Any:
    """What FSDP's mixed precision does to floating-point tensors among arguments and results."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.bfloat16()
    if isinstance(value, tuple):
        return tuple(map(rounded, value))
    return value


def test_casts_of_arguments_and_results_leave_normaliser_and_logs_alone(tmp_path: Path) -> None:
    def casting(model: Any) -> Any:
        model.register_forward_pre_hook(
            lambda module, args, kwargs: (rounded(args), {key: rounded(value) for key, value in kwargs.items()}),
            with_kwargs=True,
        )
        return model

    def of(model: Any) -> Any:
        return train(WeightedTrainer, apply_fused_loss(model, LAM), tmp_path, 2, 2)

    exact, cast = of(build("llama")), of(casting(build("llama")))
    assert torch.equal(parameters(cast), parameters(exact))
    model = build("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: rounded(out))
    logs = of(model).state.log_history[0]
    for key in ("task_loss/0", "task_loss/1", "task_loss/2"):
        assert logs[key] == exact.state.log_history[0][key]
    assert logs["loss"] != exact.state.log_history[0]["loss"]


@pytest.mark.parametrize("change", [lambda out: out * 2, lambda out: out[0]], ids=["longer", "no tuple"])
def test_a_hook_that_changes_what_the_head_returns(change: Callable[[Any], Any]) -> None:
    model = apply_fused_loss(build("llama"))
    model.lm_head.register_forward_hook(lambda module, args, out: change(out))
    with pytest.raises(ValueError, match="a forward hook on the head of LlamaForCausalLM changes its output"):
        model(**TestMissingTasks().without(records(2)))


def test_copies_of_one_process_are_refused() -> None:
    """``DataParallel`` copies every module by this method, and the copies of the model have one bound forward."""
    model = build("llama")
    copies = [module._replicate_for_data_parallel() for module in model.modules()]
    assert len(copies) > 5
    apply_fused_loss(model, LAM)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot run in torch.nn.DataParallel.*one process per GPU"):
        [module._replicate_for_data_parallel() for module in model.modules()]


@pytest.mark.parametrize(
    ("kind", "per_token"),
    [("PROMPT_TUNING", False), ("PREFIX_TUNING", False), ("PREFIX_TUNING", True)],  # PEFT lengthens labels, not tasks
)
def test_positions_that_peft_puts_in_front(kind: str, per_token: bool, tmp_path: Path) -> None:
    """Behind virtual tokens the first label is predicted too, and counts in the denominator."""
    configs = {"PROMPT_TUNING": peft.PromptTuningConfig, "PREFIX_TUNING": peft.PrefixTuningConfig}
    config = configs[kind](task_type="CAUSAL_LM", num_virtual_tokens=4)

    def whole(rows: Any) -> dict[str, Tensor]:
        batch = collate(rows)
        batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
        if per_token:
            batch["loss_task_ids"] = batch["loss_task_ids"][:, None].expand_as(batch["labels"]).contiguous()
        return batch

    torch.manual_seed(0)
    model = peft.get_peft_model(build("llama"), config)
    batch = whole(records(4))
    ids, labels = batch["loss_task_ids"], batch["labels"]
    logits = model(**{key: value for key, value in batch.items() if key in ("input_ids", "attention_mask")}).logits
    added = logits.shape[1] - labels.shape[1]
    assert added == (4 if kind == "PROMPT_TUNING" else 0)
    labels = torch.nn.functional.pad(labels, (added, 0), value=-100)
    expected = reference_task_cross_entropy(logits, labels, ids, torch.tensor(LAM), shift=True).loss
    apply_fused_loss(model, LAM)
    trainer = WeightedTrainer(
        model=model, args=arguments(tmp_path, 2, 2, steps=1), train_dataset=records(4), data_collator=whole
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


class TestContinuing:
    class Changing(transformers.TrainerCallback):
        """New weights after the first step, once."""

        def __init__(self, model: Any) -> None:
            self.model = model

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                set_task_weights(self.model, [9.0, 1.0, 1.0])

    def trainer(self, path: Path, weights: list[float], steps: int) -> Any:
        model = apply_fused_loss(build("llama"), weights)
        args = arguments(path, 2, 2, steps=steps, save_strategy="steps", save_steps=2)
        return WeightedTrainer(
            model=model, args=args, train_dataset=records(40), data_collator=collate, callbacks=[self.Changing(model)]
        )

    def test_has_the_weights_that_it_had(self, tmp_path: Path) -> None:
        whole = self.trainer(tmp_path / "whole", LAM, 4)
        whole.train()
        self.trainer(tmp_path / "parts", LAM, 2).train()
        resumed = self.trainer(tmp_path / "parts", LAM, 4)
        resumed.train(resume_from_checkpoint=True)
        assert torch.equal(parameters(resumed), parameters(whole))
        assert resumed.state.log_history[-2]["task_weight/0"] == 9.0

    def test_keeps_what_a_script_asks_for_now(self, tmp_path: Path) -> None:
        self.trainer(tmp_path, LAM, 2).train()
        changed = self.trainer(tmp_path, [1.0, 1.0, 3.0], 4)
        changed.train(resume_from_checkpoint=True)
        assert changed.model.cotbal_fused_loss.task_weights.tolist() == [1.0, 1.0, 3.0]


def test_logits_for_metrics_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    keep: Callable[..., Any] = lambda logits, labels: logits.argmax(-1)  # noqa: E731
    with pytest.raises(ValueError, match="preprocess_logits_for_metrics has no logits"):
        WeightedTrainer(
            model=apply_fused_loss(build("llama"), LAM), args=arguments(tmp_path, 2, 1),
            preprocess_logits_for_metrics=keep,
        )  # fmt: skip


def test_tasks_are_logged_where_evaluation_generates(tmp_path: Path) -> None:
    """``Seq2SeqTrainer`` calls the model around ``compute_loss`` in evaluation."""

    class Around(PlainTrainer):
        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return model(**inputs).loss.detach(), None, None

    class Trainer(TaskWeightedTrainerMixin, Around):
        pass

    found = []
    for kind in (Trainer, WeightedTrainer):
        model = apply_fused_loss(build("llama"), LAM)
        trainer = kind(model=model, args=arguments(tmp_path, 2, 1), eval_dataset=records(6), data_collator=collate)
        found.append(trainer.evaluate())
    for task in "012":
        assert found[0][f"eval_task_loss/{task}"] == found[1][f"eval_task_loss/{task}"]


def test_a_prediction_without_labels_has_logits(tmp_path: Path) -> None:
    model = apply_fused_loss(build("llama"), LAM)

    def unlabelled(rows: Any) -> dict[str, Tensor]:
        return {key: value for key, value in collate(rows).items() if key != "labels"}

    trainer = WeightedTrainer(model=model, args=arguments(tmp_path, 2, 1), data_collator=unlabelled)
    batch = unlabelled(records(3))
    expected = build("llama")(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    found = torch.tensor(trainer.predict(records(3)).predictions)
    torch.testing.assert_close(found, expected)


def test_global_normalizer_of_virtual_tokens() -> None:
    """What docs/swap_in.md says to do in a loop of one's own."""
    labels = torch.tensor([[5, 6, -100]])
    ids = torch.tensor([1])
    lam = torch.tensor([1.0, 2.0])
    padded = torch.nn.functional.pad(labels, (1, 0), value=-100)
    assert global_normalizer([labels], [ids], lam, shift=True).item() == 2.0
    assert global_normalizer([padded], [ids], lam, shift=True).item() == 4.0
