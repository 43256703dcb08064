"""``transformers.Trainer`` with a patched model, plain and with :class:`TaskWeightedTrainerMixin`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_problems import FP32, error

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # Trainer needs it

from hf_models import batch_for, build, labels_for, one_thread  # noqa: E402, F401

from cotbal_kernels import global_normalizer  # noqa: E402
from cotbal_kernels.huggingface import TaskWeightedTrainerMixin, apply_fused_loss, set_task_weights  # noqa: E402
from cotbal_kernels.reference import reference_task_cross_entropy  # noqa: E402

LAM = [1.7, 0.2, 0.9]
Record = dict[str, Any]


class PlainTrainer(transformers.Trainer):
    """In the order of the data, so that a loop by hand can follow."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class WeightedTrainer(TaskWeightedTrainerMixin, PlainTrainer):
    pass


def records(count: int, seed: int = 0) -> list[Record]:
    """Sequences of 6 to 14 tokens of which 1 to all but 2 are supervised: batches are uneven."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(6, 15, (), generator=generator))
        ids = torch.randint(3, 80, (length,), generator=generator)
        prompt = int(
            torch.randint(length, (), generator=generator)
        )  # 0: the first token is supervised, and has no prediction
        labels = torch.cat([torch.full((prompt,), -100), ids[prompt:]])
        task = int(torch.randint(3, (), generator=generator))
        found.append({"input_ids": ids, "labels": labels, "loss_task_ids": task, "source": "unused"})
    return found


def collate(batch: Sequence[Record]) -> dict[str, torch.Tensor]:
    def padded(name: str, value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([b[name] for b in batch], batch_first=True, padding_value=value)

    out = {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100)}
    out["attention_mask"] = (out["input_ids"] != 0).long()
    if "loss_task_ids" in batch[0]:
        out["loss_task_ids"] = torch.tensor([b["loss_task_ids"] for b in batch])
    return out


def collate_as_trl(batch: Sequence[Record]) -> dict[str, torch.Tensor]:
    """As TRL's collator for prompts and completions: position ids, and a mask that is no argument of the model."""
    out = collate(batch)
    out["position_ids"] = torch.arange(out["labels"].shape[1]).expand_as(out["labels"]).contiguous()
    return out | {"completion_mask": (out["labels"] != -100).long()}


def arguments(path: Path, batch: int, accumulation: int, steps: int = 5, **changes: Any) -> Any:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    return transformers.TrainingArguments(output_dir=str(path), **defaults | changes)


def train(
    kind: type, model: Any, path: Path, batch: int, accumulation: int, collator: Any = collate, **more: Any
) -> Any:
    trainer = kind(
        model=model,
        args=arguments(path, batch, accumulation),
        train_dataset=records(40),
        data_collator=collator,
        **more,
    )
    trainer.train()
    return trainer


def parameters(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("kind", ["llama", "cohere"])
@pytest.mark.parametrize("aggregation", ["token", "task"])
def test_accumulation_equals_one_large_batch(kind: str, aggregation: str, tmp_path: Path) -> None:
    """Eq. 2 over uneven micro-batches. Also against a plain loop with the loss in float64."""
    runs = [
        train(WeightedTrainer, apply_fused_loss(build(kind), LAM, aggregation=aggregation), tmp_path, batch, 8 // batch)
        for batch in (2, 8)
    ]
    start = torch.cat([p.detach().flatten() for p in build(kind).parameters()])
    several, one = map(parameters, runs)
    assert float((one - start).abs().max()) > 0.01
    assert float((several - one).abs().max()) <= 1e-6
    for a, b in zip(runs[0].state.log_history[:5], runs[1].state.log_history[:5], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)

    model = build(kind).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = records(40)
    for first in range(0, 40, 8):
        batch = collate(data[first : first + 8])
        ids, labels = batch.pop("loss_task_ids"), batch.pop("labels")
        loss = reference_task_cross_entropy(
            model(**batch).logits, labels, ids, torch.tensor(LAM), shift=True, aggregation=aggregation
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((one - expected).abs().max()) <= 1e-6


class EvaluateWithinSteps(transformers.TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.trainer.evaluate()


def test_a_router_loss_is_a_mean_over_the_micro_batches_of_a_step(tmp_path: Path) -> None:
    """Eq. 2 over the step, and the model's coefficient times the mean of its router loss; in evaluation too, which a
    callback starts within every step here.

    A pass outside of the trainer, afterwards, has the whole of its router loss.
    """
    changes = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    lam = torch.tensor(LAM)
    trainer = WeightedTrainer(
        model=apply_fused_loss(build("mixtral", **changes), LAM),
        args=arguments(tmp_path, 2, 4, steps=2, per_device_eval_batch_size=2),
        train_dataset=records(16),
        eval_dataset=records(2, seed=1),
        data_collator=collate,
    )
    trainer.add_callback(EvaluateWithinSteps(trainer))
    trainer.train()
    model = build("mixtral", **changes).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(2):
        data = records(16)[8 * step : 8 * step + 8]
        batches = [collate(data[first : first + 2]) for first in range(0, 8, 2)]
        tasks = [batch.pop("loss_task_ids") for batch in batches]
        norm = global_normalizer([batch["labels"] for batch in batches], tasks, lam, shift=True)
        optimizer.zero_grad()
        total = 0.0
        for batch, ids in zip(batches, tasks, strict=True):
            labels = batch.pop("labels")
            out = model(**batch)
            own = reference_task_cross_entropy(out.logits, labels, ids, lam, shift=True, normalizer=norm).loss
            loss = own + 0.3 * out.aux_loss / 4
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        assert logged[step] == pytest.approx(total, rel=1e-5)
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((parameters(trainer) - expected).abs().max()) <= 1e-6
    batch = collate(records(2, seed=1))
    ids, labels = batch.pop("loss_task_ids"), batch.pop("labels")
    with torch.no_grad():
        out = model.eval()(**batch)
    own = reference_task_cross_entropy(out.logits, labels, ids, lam, shift=True).loss
    with torch.no_grad():
        norm = global_normalizer(labels, ids, lam, shift=True)
        alone = trainer.model.eval()(**batch, labels=labels, loss_task_ids=ids, num_items_in_batch=norm).loss
    assert float(alone) == pytest.approx(float(own + 0.3 * out.aux_loss), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(own + 0.3 * out.aux_loss), rel=1e-5)


def without_tasks(batch: Sequence[Record]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in collate(batch).items() if name != "loss_task_ids"}


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_plain_trainer(kind: str, tmp_path: Path) -> None:
    """With weights of one a patched model trains as the model unpatched, accumulation and all."""
    changes: dict[str, Any] = {"output_router_logits": True} if kind == "mixtral" else {}
    own = train(PlainTrainer, build(kind, **changes), tmp_path, 2, 4, without_tasks)
    fused = train(PlainTrainer, apply_fused_loss(build(kind, **changes)), tmp_path, 2, 4, without_tasks)
    assert float((parameters(own) - parameters(fused)).abs().max()) <= 1e-6
    for a, b in zip(own.state.log_history[:5], fused.state.log_history[:5], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_models_that_refuse_the_normalizer(tmp_path: Path) -> None:
    """Qwen2.5-VL says accepts_loss_kwargs = False, and Trainer would take a mean of means."""
    model = build("qwen2_5_vl")
    assert model.accepts_loss_kwargs is False
    args = arguments(tmp_path, 2, 4)
    assert not transformers.Trainer(model=model, args=args).model_accepts_loss_kwargs
    assert transformers.Trainer(model=apply_fused_loss(model), args=args).model_accepts_loss_kwargs


@pytest.mark.parametrize("aggregation", ["token", "task"])
def test_collator_of_trl(aggregation: str, tmp_path: Path) -> None:
    runs = [
        train(WeightedTrainer, apply_fused_loss(build("llama"), LAM, aggregation=aggregation), tmp_path, 2, 4, collator)
        for collator in (collate, collate_as_trl)
    ]
    a, b = map(parameters, runs)
    assert float((a - b).abs().max()) <= 1e-6


def test_logs(tmp_path: Path) -> None:
    """Means per task of what each step saw, under the weights of the step."""
    torch.manual_seed(0)
    model = apply_fused_loss(build("llama"), LAM)
    names = ["vqa", "boxes", "chat"]
    trainer = train(WeightedTrainer, model, tmp_path, 4, 2, task_names=names, eval_dataset=records(6, seed=1))
    first = trainer.state.log_history[0]
    batch = collate(records(40)[:8])
    ids, labels = batch.pop("loss_task_ids"), batch.pop("labels")
    expected = reference_task_cross_entropy(build("llama")(**batch).logits, labels, ids, torch.tensor(LAM), shift=True)
    assert first["loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    for task, name in enumerate(names):
        assert first[f"task_tokens/{name}"] == expected.task_tokens[task]
        assert first[f"task_loss/{name}"] == pytest.approx(
            float(expected.task_loss[task] / expected.task_tokens[task]), rel=1e-5
        )
        assert first[f"task_weight/{name}"] == pytest.approx(LAM[task])
    second = trainer.state.log_history[1]
    tokens = sum(int((record["labels"][1:] != -100).sum()) for record in records(40)[8:16])
    assert sum(second.get(f"task_tokens/{name}", 0) for name in names) == tokens  # since the first log
    metrics = trainer.evaluate()
    assert trainer.state.log_history[-1]["eval_task_tokens/vqa"] == metrics["eval_task_tokens/vqa"]
    total = sum(metrics[f"eval_task_tokens/{name}"] for name in names if f"eval_task_tokens/{name}" in metrics)
    assert total == sum(int((record["labels"][1:] != -100).sum()) for record in records(6, seed=1))


def test_a_prediction_between_evaluations_changes_nothing(tmp_path: Path) -> None:
    """Each loop has the sums of its own records, under its own prefix."""
    model = apply_fused_loss(build("llama"), LAM).eval()
    trainer = WeightedTrainer(
        model=model, args=arguments(tmp_path, 2, 1), eval_dataset=records(6, seed=1), data_collator=collate
    )

    def of_tasks(metrics: dict[str, float]) -> dict[str, float]:
        return {key: value for key, value in metrics.items() if "_task_" in key}

    first, predicted = of_tasks(trainer.evaluate()), of_tasks(trainer.predict(records(20, seed=2)).metrics)
    again = of_tasks(trainer.evaluate(metric_key_prefix="train"))
    assert of_tasks(trainer.evaluate()) == first
    assert {key.removeprefix("train"): value for key, value in again.items()} == {
        key.removeprefix("eval"): value for key, value in first.items()
    }
    expected = sum(int((record["labels"][1:] != -100).sum()) for record in records(20, seed=2))
    assert sum(value for key, value in predicted.items() if key.startswith("test_task_tokens/")) == expected


def test_a_second_trainer_takes_a_model_that_mixed_precision_has_wrapped(tmp_path: Path) -> None:
    model = apply_fused_loss(build("llama"), LAM)
    for folder in ("a", "b"):
        given = {"model": model, "train_dataset": records(8), "data_collator": collate}
        trainer = WeightedTrainer(args=arguments(tmp_path / folder, 4, 2, steps=1, bf16=True), **given)
        trainer.train()
        assert "forward" in vars(model)
        assert not hasattr(vars(model)["forward"], "cotbal_original"), "it is wrapped"
        assert any(key.startswith("task_loss/") for key in trainer.state.log_history[0])


@pytest.mark.parametrize("mixin", [False, True])
def test_evaluation(mixin: bool, tmp_path: Path) -> None:
    """With and without predictions; those are the sums per task of each batch, since there are no logits."""
    model = apply_fused_loss(build("llama"), LAM).eval()
    data = records(6, seed=1)
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        task_loss, task_tokens, _ = prediction.predictions
        return {"mean": float(task_loss.sum() / task_tokens.sum())}

    kind = WeightedTrainer if mixin else transformers.Trainer
    losses = []
    for only_loss in (False, True):
        trainer = kind(
            model=model,
            args=arguments(tmp_path, 2, 1, per_device_eval_batch_size=3, prediction_loss_only=only_loss),
            eval_dataset=data,
            data_collator=collate,
            compute_metrics=None if only_loss else metrics,
        )
        losses.append(trainer.evaluate()["eval_loss"])
    batches = [collate(data[:3]), collate(data[3:])]
    expected = []
    for batch in batches:
        ids, labels = batch.pop("loss_task_ids"), batch.pop("labels")
        lam = torch.tensor(LAM)
        result = reference_task_cross_entropy(build("llama")(**batch).logits, labels, ids, lam, shift=True)
        tokens = result.task_tokens.sum()
        expected.append(
            (float(result.loss if mixin else (lam * result.task_loss).sum() / tokens), result.task_loss.detach())
        )
    assert losses == pytest.approx([sum(loss for loss, _ in expected) / 2] * 2, rel=1e-5)
    (prediction,) = seen
    assert prediction.predictions[0].shape == (6,)
    assert error(torch.tensor(prediction.predictions[0]), torch.cat([task_loss for _, task_loss in expected])) <= FP32


@pytest.mark.parametrize("kind", ["llava", "mixtral"])
def test_predictions_are_sums_per_task_alone(kind: str, tmp_path: Path) -> None:
    """Without features of images and router logits, which come with a model's output too."""
    changes: dict[str, Any] = {"output_router_logits": True} if kind == "mixtral" else {}
    batch, ids = batch_for(kind), torch.tensor([2, 0, 2])
    labels = labels_for(batch)
    expected = reference_task_cross_entropy(build(kind)(**batch).logits, labels, ids, torch.tensor(LAM), shift=True)
    seen = []
    trainer = WeightedTrainer(
        model=apply_fused_loss(build(kind, **changes), LAM),
        args=arguments(tmp_path, 2, 1, per_device_eval_batch_size=3),
        eval_dataset=records(6),
        data_collator=lambda _: batch | {"labels": labels, "loss_task_ids": ids},
        compute_metrics=lambda prediction: seen.append(prediction) or {},
    )
    trainer.evaluate()
    task_loss, task_tokens, task_correct = map(torch.tensor, seen[0].predictions)
    assert error(task_loss, expected.task_loss.repeat(2)) <= FP32
    assert task_tokens.tolist() == expected.task_tokens.tolist() * 2
    assert task_correct.tolist() == expected.task_correct.tolist() * 2


def test_weights_change_between_steps(tmp_path: Path) -> None:
    class Changing(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            set_task_weights(model, [1.0 + state.global_step, 1.0, 1.0])

    model = apply_fused_loss(build("llama"), [1.0, 1.0, 1.0])
    trainer = train(WeightedTrainer, model, tmp_path, 2, 4, callbacks=[Changing()])
    # Logs come after on_step_end; the weights of step 1 are replaced by then.
    assert [log["task_weight/0"] for log in trainer.state.log_history[:2]] == [2.0, 3.0]


def test_mixed_precision(tmp_path: Path) -> None:
    """accelerate wraps the forward once more and rebuilds its outputs in float32."""
    model = apply_fused_loss(build("llama"), LAM)
    args = arguments(tmp_path, 2, 4, bf16=True, steps=1)
    trainer = WeightedTrainer(model=model, args=args, train_dataset=records(40), data_collator=collate)
    trainer.train()
    exact = train(WeightedTrainer, apply_fused_loss(build("llama"), LAM), tmp_path, 2, 4).state.log_history[0]
    for key in ("loss", "task_loss/0", "task_loss/1", "task_loss/2"):
        assert trainer.state.log_history[0][key] == pytest.approx(exact[key], rel=2 * 2**-8)  # of bf16 activations
        assert trainer.state.log_history[0][key] != exact[key]


def test_denominator_of_shifted_labels_and_of_one_task(tmp_path: Path) -> None:
    """Labels that are shifted already lose no first position; one weight needs no tasks."""
    batches = [collate(records(3, seed)) for seed in (0, 1)]
    first, lam = torch.tensor([5, -100, 7]), torch.tensor(LAM)
    expected = torch.tensor(0.0)
    for batch in batches:
        labels = batch.pop("labels")
        labels[:, 0] = first
        expected += ((labels != -100).sum(1) * lam[batch["loss_task_ids"]]).sum()
        batch["shift_labels"] = labels
    trainer = WeightedTrainer(model=apply_fused_loss(build("llama"), LAM), args=arguments(tmp_path, 2, 1))
    assert float(trainer.step_normalizer(batches)) == pytest.approx(float(expected))
    assert float(trainer._get_num_items_in_batch(batches, "cpu")) == pytest.approx(float(expected))
    one = WeightedTrainer(model=apply_fused_loss(build("llama"), [0.5]), args=arguments(tmp_path, 2, 1))
    counts = sum(int((batch["shift_labels"] != -100).sum()) for batch in batches)
    for batch in batches:
        del batch["loss_task_ids"]
    assert float(one.step_normalizer(batches)) == 0.5 * counts


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path, 2, 1)
    model = apply_fused_loss(build("llama"), LAM)
    vars(model)["forward"] = model.forward.__func__.__get__(model).__call__  # as Liger binds its own
    with pytest.raises(ValueError, match=r"forward of a patched LlamaForCausalLM was replaced by "):
        WeightedTrainer(model=model, args=args)
    with pytest.raises(ValueError, match="does not carry the fused loss"):
        WeightedTrainer(model=build("llama"), args=args)
    model = apply_fused_loss(build("llama"), LAM)
    with pytest.raises(ValueError, match="task_names must have K = 3 entries, got 1"):
        WeightedTrainer(model=model, args=args, task_names=["a"])
    with pytest.raises(ValueError, match="compute_loss_func and label_smoothing_factor bypass"):
        WeightedTrainer(model=model, args=args, compute_loss_func=lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="compute_loss_func and label_smoothing_factor bypass"):
        WeightedTrainer(model=model, args=arguments(tmp_path, 2, 1, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match="aggregation='sum' has no normalizer"):
        WeightedTrainer(model=apply_fused_loss(build("llama"), aggregation="sum"), args=args)
    liger = arguments(tmp_path, 2, 1)
    liger.use_liger_kernel = True
    for config in (None, {"rope": False}, {"fused_linear_cross_entropy": True}):
        liger.liger_kernel_config = config
        with pytest.raises(ValueError, match="use_liger_kernel puts a loss without task weights"):
            WeightedTrainer(model=model, args=liger)
    liger.liger_kernel_config = {"fused_linear_cross_entropy": False}
    WeightedTrainer(model=model, args=liger)
    with monkeypatch.context() as parallel:
        parallel.setattr(transformers.TrainingArguments, "world_size", property(lambda self: 2))
        WeightedTrainer(model=model, args=args)
        uneven = arguments(tmp_path, 2, 1, average_tokens_across_devices=False)
        with pytest.raises(ValueError, match=r"start one process per GPU.*average_tokens_across_devices=True"):
            WeightedTrainer(model=model, args=uneven)
    with monkeypatch.context() as parallel:
        parallel.setattr(transformers.Trainer, "get_sp_size", lambda self: 2)
        with pytest.raises(ValueError, match="sp_size of parallelism_config"):
            WeightedTrainer(model=model, args=args)
    model.accepts_loss_kwargs = False
    with pytest.raises(ValueError, match="the trainer hands no normalizer to the model"):
        WeightedTrainer(model=model, args=args)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="start one process per GPU"):
        WeightedTrainer(model=model, args=args)
    with pytest.raises(ValueError, match="came without labels: either the batch has none, or compute_loss_func"):
        train(PlainTrainer, model, tmp_path, 2, 1, compute_loss_func=lambda outputs, labels, **_: outputs.logits.sum())
