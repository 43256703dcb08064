"""Packed training: the steps, the weights and the parameters of the same training unpacked; what is refused."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packing_models import documents, llama, llava
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, TrainingArguments

from cotbal_kernels.huggingface import apply_fused_loss
from trainer.balancing.method import MethodContext, TaskLosses
from trainer.balancing.registry import method_class, read_options
from trainer.config import LoraConfig, ModelConfig, parse_config
from trainer.data.collator import Collator
from trainer.data.encoding import IGNORE_INDEX, ConversationEncoder, Encoded
from trainer.data.packing import PackedCollator, PackedDataset, pack
from trainer.errors import UserError
from trainer.files import write_json
from trainer.launching import LaunchConfig, run_training
from trainer.loop import packing_probe
from trainer.loop.packing_probe import PackingProbe
from trainer.loop.trainer import TaskWeightedTrainer
from trainer.loop.validation import ValidationBatches
from trainer.loop.weighting import Tasks, TaskWeighting
from trainer.models.loading import load_processor
from trainer.models.lora import add_lora
from trainer.models.packable import finds_samples_in_one_row, unpackable_because
from trainer.pipeline.preflight import check_config
from trainer.tasks import load_task
from trainer.training import TrainingSpec

NAMES = ["a", "b", "c", "d"]


class Samples(Dataset[dict[str, Any]]):
    def __init__(self, images: bool) -> None:
        self.items = [{"encoded": encoded, "task_id": task} for encoded, task in documents(images)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def train(
    output: Path, name: str, packing: bool, model: Any = None, lora: ModelConfig | None = None
) -> tuple[list[list[float]], dict[str, Any]]:
    """Four steps over all eight documents; weights of every step and final parameters."""
    samples = Samples(images=False)
    collator = Collator(0, None)
    chosen = method_class(name)
    held_out = [[item for item in samples.items if item["task_id"] == task] for task in range(3)]
    validation = ValidationBatches(
        [len(found) for found in held_out], lambda task, record: held_out[task][record], collator, per_task=2,
        batch_size=3, seed=0,
    )  # fmt: skip
    context = MethodContext(
        num_tasks=3, device=torch.device("cpu"), seed=3, fixed_weights=torch.tensor([0.4, 1.8, 0.8]),
        validation_batches=validation.batches_per_pass if chosen.needs.validation else 0,
    )  # fmt: skip
    weighting = TaskWeighting(
        chosen(context, read_options(name, {"warmup": 1, "window": 3} if name == "coba" else {})),
        Tasks(NAMES, [True, True, True, False]),
        validation if chosen.needs.validation else None,
        1,
        output / "weights.csv",
    )
    lengths = [len(item["encoded"].input_ids) for item in samples.items]
    dataset = PackedDataset(samples, pack(lengths, 24, seed=5)) if packing else samples
    assert len(dataset) == (4 if packing else 8)  # type: ignore[arg-type]
    output.mkdir(parents=True, exist_ok=True)
    arguments = TrainingArguments(
        output_dir=str(output), use_cpu=True, per_device_train_batch_size=len(dataset) // 2,  # type: ignore[arg-type]
        gradient_accumulation_steps=2, learning_rate=0.05, lr_scheduler_type="constant", max_steps=4, optim="sgd",
        save_strategy="no", logging_steps=1, report_to=[], disable_tqdm=True, remove_unused_columns=False,
        average_tokens_across_devices=True, max_grad_norm=0.0,
    )  # fmt: skip
    model = model or llama()
    apply_fused_loss(model, num_tasks=4, aggregation=_aggregation(weighting))
    if lora is not None:
        torch.manual_seed(0)
        model = add_lora(model, lora)
    collate = PackedCollator(0, None) if packing else collator
    trainer = TaskWeightedTrainer(
        weighting=weighting, model=model, args=arguments, train_dataset=dataset, data_collator=collate
    )
    if isinstance(dataset, PackedDataset) and isinstance(collate, PackedCollator):
        trainer.add_callback(PackingProbe(trainer, collate, dataset))
    trainer.train()
    with (output / "weights.csv").open(newline="") as file:
        rows = [[float(value) for value in row] for row in list(csv.reader(file))[1:]]
    return rows, {name: value.detach().clone() for name, value in model.named_parameters()}


def _aggregation(weighting: TaskWeighting) -> str:
    return "token" if weighting.method.options.aggregation == "token" else "task"


@pytest.mark.parametrize("name", ["cotbal", "tla", "lbtw", "coba", "gradnorm_star"])
def test_a_packed_training_is_the_unpacked_one(name: str, tmp_path: Path) -> None:
    """Methods of every kind: fixed weights, a normaliser per task, training losses, validation losses, and (with LoRA)
    gradients of the head.

    Four steps of float32 sums in another order: 1e-5 of weights near 1 and of parameters below 1.
    """
    torch.set_num_threads(1)
    lora = ModelConfig(lora=LoraConfig(rank=4, alpha=8.0, dropout=0.0)) if name == "gradnorm_star" else None
    weights, parameters = train(tmp_path / "packed", name, packing=True, lora=lora)
    expected_weights, expected = train(tmp_path / "unpacked", name, packing=False, lora=lora)
    torch.testing.assert_close(torch.tensor(weights), torch.tensor(expected_weights), rtol=0, atol=1e-5)
    for key, value in expected.items():
        torch.testing.assert_close(parameters[key], value, rtol=0, atol=1e-5)
    if lora is None:
        start = dict(llama().named_parameters())
        assert max(float((expected[key] - start[key].detach()).abs().max()) for key in expected) > 0.02
    else:
        assert max(float(value.abs().max()) for key, value in expected.items() if "lora_B" in key) > 0.002
    if name not in ("cotbal", "tla"):
        assert len({tuple(row[1:]) for row in weights}) > 1, "the weights do not move"


def test_a_model_whose_samples_meet_is_refused_when_training_starts(tmp_path: Path) -> None:
    """One that drops the positions it is given, so that transformers sees one long document."""

    class Forgetful(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = llama()
    model.__class__ = Forgetful
    message = r"training\.packing: in this Forgetful with sdpa attention a sample's loss depends on the sample before"
    with pytest.raises(UserError, match=message):
        train(tmp_path / "packed", "ew", packing=True, model=model)


def look(
    monkeypatch: pytest.MonkeyPatch, labels: list[int], losses: tuple[float, float], half: bool, experts: int
) -> list[list[Encoded]]:
    """The probe of a model that has these losses; returns the samples of its two rows."""
    rows: list[list[Encoded]] = []
    found = iter(losses)

    def measured(trainer: Any, batches: list[list[Encoded]], num_tasks: int) -> TaskLosses:
        rows.extend(batches)
        loss = torch.tensor([next(found)], dtype=torch.float64)
        return TaskLosses(loss, torch.full_like(loss, 8))

    text = SimpleNamespace(_attn_implementation="sdpa", num_local_experts=experts)
    dtype = torch.bfloat16 if half else torch.float32
    model = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: text), parameters=lambda: iter([torch.zeros(1, dtype=dtype)])
    )
    trainer: Any = SimpleNamespace(model=model, weighting=SimpleNamespace(weights=torch.ones(1)))
    dataset: Any = [[{"encoded": Encoded(list(range(len(labels))), labels)}]]
    collator: Any = lambda packed: [item["encoded"] for item in packed[0]]  # noqa: E731
    monkeypatch.setattr(packing_probe, "forward_only", measured)
    arguments: Any = None
    PackingProbe(trainer, collator, dataset).on_train_begin(arguments, arguments, arguments)
    return rows


@pytest.mark.parametrize(
    ("labels", "words", "others"),
    [
        ([IGNORE_INDEX, 7, 8, 9], [7, 8, 9] * 2 + [7, 8], [8, 7] + [9, 8, 7] * 2),
        ([IGNORE_INDEX, 5], [5] * 8, [0] * 8), ([0, 0], [0] * 8, [1] * 8),
        (list(range(3, 20)), list(range(3, 11)), list(range(10, 2, -1))),
    ],
)  # fmt: skip
def test_the_probe_changes_the_sample_before_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, labels: list[int], words: list[int], others: list[int]
) -> None:
    rows = look(monkeypatch, labels, (1.0, 1.0), half=False, experts=0)
    silent = [IGNORE_INDEX] * 8
    assert rows == [[Encoded(before, silent), Encoded(words, words)] for before in (words, others)]


@pytest.mark.parametrize(
    ("half", "experts", "rounding"), [(False, 0, 1e-6), (True, 0, 1e-3), (False, 4, 1e-4), (True, 4, 1e-2)]
)
def test_the_probe_allows_for_rounding_of_the_loss_s_size(
    monkeypatch: pytest.MonkeyPatch, half: bool, experts: int, rounding: float
) -> None:
    for loss in (0.5, 50.0):
        look(monkeypatch, [1, 2], (loss, loss * (1 - 0.9 * rounding)), half, experts)
        with pytest.raises(UserError, match="depends on the sample before it"):
            look(monkeypatch, [1, 2], (loss, loss * (1 + 1.1 * rounding)), half, experts)


ROPE = {"rope_type": "default", "rope_theta": 1e4}


def _config(name: str, **options: Any) -> Any:
    return getattr(transformers, f"{name}Config")(**options)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (_config("Mamba"), "layers that carry a state"), (_config("Jamba"), "layers that carry a state"),
        (_config("Lfm2", layer_types=["conv", "full_attention"], num_hidden_layers=2), "a state.*(conv|linear)"),
        (_config("Qwen3Next"), "linear_attention"), (_config("Glm4vMoe"), "positions or attention of their own"),
        (_config("Qwen2", rope_parameters={**ROPE, "mrope_section": [1, 1, 2]}),
         "mrope"),
        (_config("PaliGemma"), "not causal"), (_config("Gemma3"), "both directions"),
        (_config("Mllama"), "outside the sequence"), (_config("Bloom"), "position_ids"), (_config("Falcon", alibi=True),
         "alibi"), (_config("Llama4Text"), "cut into chunks"), (_config("T5"), None),
        (_config("Bart"), "an encoder-decoder$"), (_config("Rwkv"), "a state from token to token$"),
        (_config("GPTNeo"), "common masks"), (_config("Gemma3Text", rope_parameters={
            "sliding_attention": ROPE, "full_attention": {**ROPE, "mrope_section": [1, 1, 2]}}), "mrope"),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else "",
)  # fmt: skip
def test_models_that_cannot_be_packed(config: Any, reason: str | None) -> None:
    if reason is None:
        with pytest.raises(UserError, match="'t5' is no image-text-to-text and no causal language model"):
            unpackable_because(config)
        return
    found = unpackable_because(config)
    assert found is not None
    assert re.search(reason, found)


@pytest.mark.parametrize(("attention", "one_row"), [("sdpa", False), ("eager", False), ("flash_attention_2", True)])
def test_flash_attention_alone_needs_one_row(attention: str, one_row: bool) -> None:
    for model in (llama(), llava()):
        model.config.get_text_config()._attn_implementation_internal = attention
        assert finds_samples_in_one_row(model) == one_row


@pytest.mark.parametrize(
    "name",
    ["Llava", "LlavaNext", "Llama", "Mistral", "Qwen2", "Qwen3", "GPT2", "Phi3", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL",
     "Qwen3VLMoe", "Glm4v", "Ernie4_5_VLMoe"],
)  # fmt: skip
def test_models_that_can(name: str) -> None:
    assert unpackable_because(_config(name)) is None


def test_the_check_refuses_by_name(run_data: dict[str, Any], tmp_path: Path, pixel_model: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in pixel_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {**ROPE, "mrope_section": [2, 3, 3]}
    (folder / "config.json").write_text(json.dumps(config))
    run_data["model"]["path"] = str(folder)
    check_config(parse_config(run_data, "x"))
    run_data["training"]["packing"] = True
    with pytest.raises(UserError, match=r"training\.packing: a model of type 'llava' cannot be packed.*mrope"):
        check_config(parse_config(run_data, "x"))


@pytest.mark.slow
def test_packed_under_deepspeed_on_two_ranks(run_data: dict[str, Any], tmp_path: Path) -> None:
    """LLaVA with pixels, ZeRO-3, everything in one step: the logged loss is Eq. 2 of the records one by one."""
    run_data["model"]["max_length"] = 60
    config = parse_config(run_data, "x")
    assert not isinstance(config.tasks, str)
    encoder = ConversationEncoder(load_processor(config.model.path), 60)
    model = AutoModelForImageTextToText.from_pretrained(config.model.path, dtype=torch.float64)
    lengths, losses, tokens = [], torch.zeros(3, dtype=torch.float64), torch.zeros(3)
    for k, task in enumerate(map(load_task, config.tasks)):
        for record in task.train:
            encoded = encoder.training_sample(record, task.image_path)
            pixels = {key: value.double() for key, value in encoded.image_inputs.items()}
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([encoded.input_ids]), **pixels).logits[0, :-1]
            losses[k] += cross_entropy(logits, torch.tensor(encoded.labels[1:]), reduction="sum")
            tokens[k] += encoded.supervised
            lengths.append(len(encoded.input_ids))
    count = len(pack(lengths, 60, seed=0))
    assert count % 2 == 0, "ranks would repeat a sequence to have as many"

    settings = {"batch_size": count // 2, "packing": True, "zero_stage": 3, "logging_steps": 1, "learning_rate": 1e-2}
    run_data["training"] |= settings
    output = tmp_path / "packed"
    output.mkdir()
    spec = TrainingSpec(
        name="packed", config=parse_config(run_data, "x"), model_path=run_data["model"]["path"], mixture="all",
        method="cotbal", task_weights={"colour": 0.4, "box": 1.6}, output_dir=output,
    )  # fmt: skip
    write_json(output / "spec.json", spec.model_dump(mode="json"))
    launch = LaunchConfig(device="cpu", processes=2, threads=1)
    run_training(output / "spec.json", launch, "cpu", 0, output / "output.log")

    assert json.loads((output / "samples.json").read_text()) == {
        "samples": 24, "tokens": sum(lengths), "supervised_tokens": int(tokens.sum()), "cut": 0, "dropped": 0,
        "sequences": count,
    }  # fmt: skip
    (line,) = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    weights = torch.tensor([0.4, 1.6, 1.0])
    # Printed float32 sums of about 200 terms near 6.
    assert line["loss"] == pytest.approx(float((weights * losses).sum() / (weights * tokens).sum()), abs=3e-6)
    for k, name in enumerate(("colour", "box", "chat")):
        assert line["tasks"][name]["tokens"] == tokens[k]
        assert line["tasks"][name]["loss"] == pytest.approx(float(losses[k] / tokens[k]), abs=3e-6)


def test_images_of_the_tiny_llava_are_in_place() -> None:
    """The control of the images' order: what the collator stacks is what the documents hold, packed order first."""
    items = documents(images=True)
    rows = [[{"encoded": e, "task_id": t} for e, t in (items[1], items[0])], [{"encoded": items[3][0], "task_id": 0}]]
    batch = PackedCollator(0, None)(rows)
    held = [items[index][0].image_inputs["pixel_values"] for index in (1, 0, 3)]
    assert torch.equal(batch["pixel_values"], torch.cat(held))
    assert llava().config.image_token_id in batch["input_ids"]
    assert isinstance(items[0][0], Encoded)
