"""Whole trainings in subprocesses: the plumbing between ``transformers.Trainer``, DeepSpeed and Eq. 2."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, TrainingArguments, set_seed

from trainer.config import parse_config
from trainer.data.collator import Collator, MixtureDataset
from trainer.data.encoding import ConversationEncoder
from trainer.errors import UserError
from trainer.files import write_json
from trainer.launching import LaunchConfig, TrainingFailedError, run_training
from trainer.loop.checkpoints import COMPLETE, newest_checkpoint
from trainer.models.loading import load_config, load_processor
from trainer.pipeline.estimate import model_size, space_on_disk
from trainer.tasks import load_task
from trainer.training import TrainingSpec, training_arguments

pytestmark = pytest.mark.slow
WEIGHTS = {"colour": 0.4, "box": 1.6}
STEPS = 6  # 24 samples in batches of 8, two epochs


def run(run_data: dict[str, Any], output: Path, **training: Any) -> dict[str, torch.Tensor]:
    """Trains on everything, with WEIGHTS unless told otherwise, and returns the final parameters."""
    processes = training.pop("processes", 1)
    method = training.pop("method", "cotbal")
    options = {"aggregation": training.pop("aggregation", "token")} if method == "cotbal" else {}
    run_data["training"] |= {"epochs": 2, "learning_rate": 1e-2, "logging_steps": 1} | training
    spec = TrainingSpec(
        name="parity",
        config=parse_config(run_data, "test"),
        model_path=run_data["model"]["path"],
        mixture="all",
        method=method,
        options=options,
        task_weights=WEIGHTS if method == "cotbal" else {},
        output_dir=output,
    )
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "spec.json", spec.model_dump(mode="json"))
    launch = LaunchConfig(device="cpu", processes=processes, threads=1)
    run_training(output / "spec.json", launch, "cpu", 0, output / "output.log")
    return parameters(output)


def parameters(output: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(output / "model", dtype=torch.float32).state_dict()


def log_lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def oracle(run_data: dict[str, Any], aggregation: str, samples: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same training as a plain loop on the unpatched model: Eq. 2 (or TLA) written out, AdamW, cosine, clipping.

    A step has `samples`, and the last one of an epoch what is left.
    """
    config = parse_config(run_data, "test")
    assert not isinstance(config.tasks, str)
    training = config.training
    tasks = [load_task(task) for task in config.tasks]
    encoder = ConversationEncoder(load_processor(config.model.path), config.model.max_length)
    dataset = MixtureDataset(encoder, tasks, [task.train for task in tasks])
    collate = Collator(encoder.tokenizer.pad_token_id, encoder.blank_image())
    model = AutoModelForImageTextToText.from_pretrained(config.model.path, dtype=torch.float32).train()
    trained = {name: p for name, p in model.named_parameters() if "vision_tower" not in name}
    parameters = list(trained.values())
    peaks = [
        next((rate for part, rate in training.learning_rates.items() if part in name), training.learning_rate)
        for name in trained
    ]
    decays = [training.weight_decay if p.ndim > 1 else 0.0 for p in parameters]  # neither of biases nor of norms
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": decay} for p, decay in zip(parameters, decays, strict=True)]
    )
    weights_K = torch.tensor([WEIGHTS.get(task.name, 1.0) for task in tasks])
    share = training.warmup_ratio * STEPS
    warmup = math.ceil(share) if share >= 1 else 0
    losses, step = [], 0
    set_seed(config.seed)
    for epoch in range(2):
        shuffle = torch.Generator().manual_seed(config.seed + epoch)
        order = torch.randperm(len(dataset), generator=shuffle).tolist()
        for start in range(0, len(dataset), samples):
            batch = collate([dataset[index] for index in order[start : start + samples]])
            task_ids, labels = batch.pop("loss_task_ids"), batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            entropy = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
            supervised = labels != -100
            if aggregation == "token":
                weight = weights_K[task_ids][:, None] * supervised
                loss = (weight * entropy).sum() / weight.sum()
            else:
                rows = [(task_ids == k)[:, None] & supervised for k in task_ids.unique()]
                lambdas = weights_K[task_ids.unique()]
                means = torch.stack([entropy[row].mean() for row in rows])
                loss = (lambdas * means).sum() / lambdas.sum()
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                ratio = (step - warmup) / max(1, STEPS - warmup)
                cosine = 0.5 * (1 + math.cos(math.pi * ratio))
                group["lr"] = peak * (step / max(1, warmup) if step < warmup else cosine)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
            optimizer.step()
            losses.append(loss.item())
            step += 1
    return {name: p.detach() for name, p in model.state_dict().items()}, losses


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, value in found.items():
        error = (value - expected[name]).abs().max().item()
        assert error < tolerance, f"{name} is off by {error:.2e}"


@pytest.mark.parametrize(
    ("processes", "accumulation", "batch_size", "zero", "aggregation"),
    [
        (1, 1, 8, (2, "none"), "token"),
        (2, 2, 2, (3, "none"), "token"),
        (2, 1, 5, (1, "none"), "task"),
        (1, 2, 5, (2, "optimizer"), "token"),
        (2, 2, 2, (3, "parameters"), "token"),
    ],
)
def test_training_equals_a_plain_loop(
    processes: int,
    accumulation: int,
    batch_size: int,
    zero: tuple[int, str],
    aggregation: str,
    run_data: dict[str, Any],
    tmp_path: Path,
) -> None:
    """However a batch of 8 or 10 of 24 samples is spread, losses and parameters are those of a single-process loop over
    Eq. 2.

    Parts of the model have learning rates of their own; images are squares already, which padding leaves alone. Norms
    of gradients are on either side of where they are clipped.
    """
    model = shutil.copytree(run_data["model"]["path"], tmp_path / "pretrained")
    ends_nowhere = json.loads((model / "generation_config.json").read_text()) | {"eos_token_id": None}
    (model / "generation_config.json").write_text(json.dumps(ends_nowhere))
    run_data["model"] |= {"path": str(model), "images": {"aspect_ratio": "pad"}}
    found = run(
        run_data,
        tmp_path / "out",
        processes=processes,
        gradient_accumulation_steps=accumulation,
        batch_size=batch_size,
        zero_stage=zero[0],
        offload=zero[1],
        overlap_comm=zero[0] >= 2,
        gradient_checkpointing=accumulation == 2,
        weight_decay=0.1,
        max_grad_norm=1.78,
        learning_rates={"multi_modal_projector": 2e-3, "layers.0.mlp": 3e-2},
        aggregation=aggregation,
    )
    expected, losses = oracle(run_data, aggregation, processes * accumulation * batch_size)
    lines = log_lines(tmp_path / "out")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    # Adam divides by the root of tiny second moments, which magnifies rounding: 1e-2 per step times 1e-4.
    assert [line["loss"] for line in lines] == pytest.approx(losses, abs=2e-5)
    assert_same(found, expected, 2e-4)
    assert max(line["learning_rate"] for line in lines) == 1e-2  # of the parts that have none of their own
    processor = load_processor(str(tmp_path / "out" / "model"))
    assert processor.image_processor.do_pad  # and so it was in the training
    saved = json.loads((tmp_path / "out" / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [processor.tokenizer.eos_token_id]  # of the chat template
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "out" / "model"))
    assert {key: value for key, value in after.items() if before.get(key) != value and "config" not in key} == {}


def test_bf16_follows_the_fp32_loop(run_data: dict[str, Any], tmp_path: Path) -> None:
    """bf16 keeps 8 bits: a relative error of 2^-8 in activations moves a loss near 5 by a few hundredths."""
    run(run_data, tmp_path / "out", batch_size=8, precision="bf16")
    _, losses = oracle(run_data, "token", 8)
    assert [line["loss"] for line in log_lines(tmp_path / "out")] == pytest.approx(losses, abs=0.05)


def test_per_task_log_adds_up_to_the_loss(run_data: dict[str, Any], tmp_path: Path) -> None:
    run(run_data, tmp_path / "out", batch_size=8)
    for line in log_lines(tmp_path / "out"):
        tasks = line["tasks"].values()
        numerator = sum(task["weight"] * task["tokens"] * task["loss"] for task in tasks)
        denominator = sum(task["weight"] * task["tokens"] for task in tasks)
        assert line["loss"] == pytest.approx(numerator / denominator, rel=1e-5)
        assert {name: entry["weight"] for name, entry in line["tasks"].items()} == {
            name: pytest.approx(WEIGHTS.get(name, 1.0)) for name in line["tasks"]
        }
    assert any((tmp_path / "out" / "tensorboard").rglob("events.*"))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_resumed_training_is_bitwise_the_uninterrupted_one(run_data: dict[str, Any], tmp_path: Path) -> None:
    """A kill leaves a truncated newest checkpoint: it is passed over and the one before it is used. The method moves
    its weights with validation batches and losses of before."""
    whole = run(run_data, tmp_path / "whole", batch_size=8, save_steps=4, epochs=20, method="famo_star")
    interrupted = tmp_path / "interrupted"
    spec = json.loads((tmp_path / "whole" / "spec.json").read_text()) | {"output_dir": str(interrupted)}
    interrupted.mkdir()
    write_json(interrupted / "spec.json", spec)

    def kill_after_the_second_checkpoint() -> None:
        checkpoints = list((interrupted / "checkpoints").glob(f"checkpoint-*/{COMPLETE}"))
        if len(checkpoints) >= 2:
            raise KeyboardInterrupt

    launch = LaunchConfig(device="cpu", threads=1)
    try:
        run_training(
            interrupted / "spec.json", launch, "cpu", 0, interrupted / "output.log", kill_after_the_second_checkpoint
        )
        pytest.fail("the training ended before it could be interrupted: give it more epochs")
    except KeyboardInterrupt:
        pass
    newest = newest_checkpoint(interrupted, world_size=1)
    assert newest is not None
    size = model_size(load_config(run_data["model"]["path"]), parse_config(run_data, "x").model)
    (_, three), files = space_on_disk(size, parse_config(run_data, "x"), 1).items(), newest.rglob("*")
    written = sum(path.stat().st_size for path in files if path.name.endswith(("_states.pt", ".safetensors")))
    assert three[1] / 3 == pytest.approx(written, rel=0.05)  # names and shapes, of a model that is small
    (newest / COMPLETE).unlink()
    for file in newest.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    run_training(interrupted / "spec.json", launch, "cpu", 0, interrupted / "output.log")
    assert_same(parameters(interrupted), whole, 1e-30)
    keys = ("step", "loss", "tasks")
    assert [[line[key] for key in keys] for line in log_lines(interrupted)] == [
        [line[key] for key in keys] for line in log_lines(tmp_path / "whole")
    ]
    weights = (tmp_path / "whole" / "weights.csv").read_text()
    assert (interrupted / "weights.csv").read_text() == weights
    assert len(set(weights.splitlines())) == 61
    assert len({line.split(",", 1)[1] for line in weights.splitlines()}) > 50, "the weights hardly move"


def test_another_number_of_processes_is_refused_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a checkpoint that another machine sees and this one does not."""
    checkpoint = tmp_path / "checkpoints" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / COMPLETE).touch()
    for rank in range(2):
        (checkpoint / f"rng_state_{rank}.pth").touch()
    assert newest_checkpoint(tmp_path, world_size=2) == checkpoint
    later = shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-10"))
    assert newest_checkpoint(tmp_path, world_size=2) == later
    with pytest.raises(UserError, match="written by 2 process"):
        newest_checkpoint(tmp_path, world_size=1)

    (tmp_path / "checkpoints" / "checkpoint-6").mkdir()  # without its mark

    def told(seen: list[Any], src: int) -> None:
        assert src == 0
        seen[:] = tmp_path / "checkpoints" / "checkpoint-6", 2

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", told)
    with pytest.raises(UserError, match=r"checkpoint-6 is not yet on .*start again once it is"):
        newest_checkpoint(tmp_path, world_size=2)


@pytest.mark.parametrize(
    ("use_cpu", "given", "workers"), [(False, None, 2), (True, None, 0), (False, 0, 0), (True, 3, 3)]
)
def test_a_gpu_does_not_wait_for_samples(
    use_cpu: bool,
    given: int | None,
    workers: int,
    run_data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are encoded by other processes, and copied without a stop, which memory that stays in its place allows."""

    class Kept(TrainingArguments):
        def __post_init__(self) -> None:
            """Nothing: no GPU is looked for."""

    monkeypatch.setattr("trainer.training.TrainingArguments", Kept)
    run_data["training"] |= {} if given is None else {"dataloader_workers": given}
    config = parse_config(run_data, "test")
    spec = TrainingSpec(name="x", config=config, model_path="x", mixture="all", output_dir=tmp_path)
    args = training_arguments(spec, use_cpu)
    assert args.dataloader_num_workers == workers
    assert args.accelerator_config == {"non_blocking": args.dataloader_pin_memory}
    assert args.dataloader_pin_memory is not use_cpu


@pytest.mark.parametrize("packing", [False, True])
def test_every_token_counts_once_in_an_epoch(packing: bool, run_data: dict[str, Any], tmp_path: Path) -> None:
    """24 samples in micro-batches of 5 for each of two processes: the last ones are filled up without loss."""
    run(run_data, tmp_path / "out", processes=2, batch_size=5, packing=packing)
    config = parse_config(run_data, "test")
    assert not isinstance(config.tasks, str)
    encoder = ConversationEncoder(load_processor(config.model.path), config.model.max_length)
    expected = {
        name: 2 * sum(encoder.training_sample(record, task.image_path).supervised for record in task.train)  # epochs
        for task in map(load_task, config.tasks)
        for name in [task.name]
    }
    found = dict.fromkeys(expected, 0)
    for line in log_lines(tmp_path / "out"):
        for name, entry in line["tasks"].items():
            found[name] += entry["tokens"]
    assert found == expected


def test_a_training_that_diverges_ends_with_a_sentence(run_data: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TrainingFailedError, match=r"diverged: its loss is nan at step \d of 6; lower training\.learn"):
        run(run_data, tmp_path / "out", batch_size=8, learning_rate=1e30, max_grad_norm=0.0)
    assert not (tmp_path / "out" / "model").exists()


def test_a_failing_training_names_its_log_and_shows_its_end(run_data: dict[str, Any], tmp_path: Path) -> None:
    run_data["model"]["freeze"] = ["no_such_parameter"]
    with pytest.raises(TrainingFailedError, match=r"output\.log") as caught:
        run(run_data, tmp_path / "out")
    assert "no parameter of" in str(caught.value)
