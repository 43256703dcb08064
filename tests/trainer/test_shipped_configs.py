"""The shipped configurations of the papers' settings: dry runs on small local records and the real models' sizes."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import yaml
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2Config

import trainer.config
from trainer.config import load_config
from trainer.data.mixtures import mini_size
from trainer.data.packing import pack
from trainer.models.loading import load_processor
from trainer.models.tiny_llava import CHAT_TEMPLATE, train_tokenizer

CONFIGS = Path(trainer.config.__file__).parent / "configs"
GIB = 2**30
IMAGE_TOKENS = 4  # of the small processor that counts here

# Parameters of LLaVA-1.5-7B, from the published sizes: CLIP ViT-L/14 at 336 pixels, projector, Vicuna-7B.
CLIP = (1024 + 14 * 14 * 3 * 1024 + 577 * 1024) + 4 * 1024 + 24 * (
    4 * (1024 * 1024 + 1024) + 4 * 1024 + (1024 * 4096 + 4096) + (4096 * 1024 + 1024)
)  # fmt: skip
PROJECTOR = (1024 * 4096 + 4096) + (4096 * 4096 + 4096)
VICUNA = 2 * 32064 * 4096 + 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096) + 4096
LORA = 128 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
# Qwen1.5-1.8B: biases on q, k and v, an untied head.
QWEN = 2 * 151936 * 2048 + 24 * (4 * 2048 * 2048 + 3 * 2048 + 3 * 2048 * 5504 + 2 * 2048) + 2048


PATCHES = 64**2 / 14**2  # of an image as the small model's processor makes it, for the large encoder


@pytest.fixture(scope="module")
def llava_folder(pixel_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-1.5-7B's configuration without weights, with the small model's processor."""
    folder = Path(shutil.copytree(pixel_model, tmp_path_factory.mktemp("models") / "llava"))
    (folder / "model.safetensors").unlink()
    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                              image_size=336, patch_size=14, projection_dim=768)  # fmt: skip
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)
    LlavaConfig(vision_config=vision, text_config=text, image_seq_length=576).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen_folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen1.5-1.8B's configuration without weights, with a small tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "qwen"
    tokenizer = train_tokenizer(texts, 340)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = Qwen2Config(vocab_size=151936, num_key_value_heads=16, tie_word_embeddings=False, **size)
    config.save_pretrained(folder)
    return folder


def rows(name: str, count: int, image: bool) -> list[dict[str, Any]]:
    """Records of two turns of uneven length; one question each where they are scored."""
    made = []
    for number in range(count):
        turns = []
        for turn in range(1 + number % 2):
            question = f"{'<image>' if image and not turn else ''} What is {number}?" + " Say more." * (number % 7)
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is {number + turn}."}]
        made.append({"id": f"{name}-{number}", "conversations": turns} | ({"image": "a.png"} if image else {}))
    return made


@pytest.fixture
def write_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, list[dict[str, Any]]]]:
    """Writes every file that a configuration names below $COTBAL_DATA; returns the training records by task."""
    monkeypatch.setenv("COTBAL_DATA", str(tmp_path / "data"))

    def write(name: str) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for index, task in enumerate(yaml.safe_load((CONFIGS / name).read_text())["tasks"]):
            image = "image_root" in task
            found[task["name"]] = rows(task["name"], 70 + 41 * index, image)
            for split in ("train", "validation", "test"):
                files = task.get(split, [])
                for file in files.values() if isinstance(files, dict) else [files] if files else []:
                    path = Path(file.replace("${COTBAL_DATA}", str(tmp_path / "data")))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    kept = found[task["name"]] if split == "train" else rows("held-out", 6, image)[::2]
                    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        return found

    return write


def lengths(records: list[dict[str, Any]], folder: Path) -> list[tuple[int, int]]:
    """(tokens, supervised tokens) of each record: the template written out, images as so many tokens."""
    processor = load_processor(str(folder))
    tokenizer = getattr(processor, "tokenizer", processor)
    found = []
    for record in records:
        tokens = supervised = 0
        for index, turn in enumerate(record["conversations"]):
            text = turn["value"]
            if "<image>" in text:
                text = text.replace("<image>", "").strip()
            answer = index % 2
            head = "<|assistant|>" if answer else "<|user|>"
            count = len(tokenizer(f" {text}")["input_ids"])
            tokens += len(tokenizer(head)["input_ids"]) + count + answer  # </s>
            tokens += IMAGE_TOKENS if turn["value"].startswith("<image>") else 0
            supervised += (count + 1) * answer
        found.append((tokens, supervised))
    return found


def table(out: str, header: str) -> dict[str, list[str]]:
    """Rows by training of the table whose header begins so."""
    lines = out.splitlines()
    start = next(index for index, line in enumerate(lines) if line.split()[:2] == ["training", header])
    found = {}
    for line in lines[start + 1 :]:
        if not re.match(r"\S+ +[\d,]+ ", line) or line.startswith(("cost", "tokens", "time")):
            break
        found[line.split()[0]] = [word.replace(",", "") for word in line.split()[1:]]
    return found


UNITS = {"s": 1, "min": 60, "h": 3600, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def amount(words: list[str]) -> float:
    """Seconds or bytes of numbers and units, as in 3 h 05 min; the last three digits are to be had."""
    return sum(
        float(number.replace(",", "")) * UNITS[unit] for number, unit in zip(words[::2], words[1::2], strict=True)
    )


def printed(pattern: str, out: str) -> float:
    """The number that is the pattern's group, or the amount that follows the pattern."""
    match = re.search(pattern if "(" in pattern else rf"{pattern} ((?:[\d.,]+ (?:[KMGT]iB|h|min|s)\b ?)+)", out)
    assert match, out
    return float(match[1].replace(",", "")) if "(" in pattern else amount(match[1].split())


def dry_run(cotbal: Any, name: str, folder: Path, *more: str) -> str:
    outcome = cotbal("run", CONFIGS / name, "--dry-run", "--set", f"model.path={folder}", *more)
    assert (outcome.code, outcome.err) == (0, "")
    return outcome.out


def test_the_papers_setting(cotbal: Any, write_records: Any, llava_folder: Path) -> None:
    """Section 4.1, and its dry run against arithmetic: 128 samples a step, 16 bytes a trained parameter on 8 GPUs."""
    records = write_records("cotbal_llava15_7b.yaml")
    config = load_config(CONFIGS / "cotbal_llava15_7b.yaml")
    assert (config.cotbal.temperature, config.cotbal.alpha, config.cotbal.mini_ratio) == (0.5, 0.5, 1 / 32)
    assert (config.training.learning_rate, config.training.epochs, config.training.zero_stage) == (2e-5, 1, 3)
    assert config.model.images.aspect_ratio == "pad"  # LLaVA-1.5's fine-tuning
    assert len(config.tasks) == 8
    out = dry_run(cotbal, "cotbal_llava15_7b.yaml", llava_folder, "--tflops", "0.02", "--mfu", "0.5")

    sizes = {name: len(found) for name, found in records.items()}
    plan, data = table(out, "records"), table(out, "samples")
    assert len(plan) == len(data) == 1 + 7 + 6 + 6  # proxies, final and compared, single tasks with a test set
    minis = {name: mini_size(size, 1 / 32) for name, size in sizes.items()}
    expected = {"mini": sum(minis.values()), "cotbal": sum(sizes.values()), "stl-gqa": sizes["gqa"]}
    expected["plus-vqav2"] = expected["mini"] - minis["vqav2"] + sizes["vqav2"]
    for name, count in expected.items():
        assert (int(plan[name][0]), int(data[name][0])) == (count, count)
        assert int(plan[name][1]) == math.ceil(count / (16 * 8)), name
    counted = [length for found in records.values() for length in lengths(found, llava_folder)]
    tokens, supervised = (sum(values) for values in zip(*counted, strict=True))
    assert [int(word) for word in data["cotbal"][1:3]] == [tokens, supervised]

    total, trained = VICUNA + PROJECTOR + CLIP, VICUNA + PROJECTOR
    assert round(total / 1e9, 2) == 7.06
    assert printed(r"parameters ([\d,]+),", out) == total
    assert printed(r"trained ([\d,]+),", out) == trained
    assert printed(r"frozen image encoder ([\d,]+)", out) == CLIP
    memory = {"parameters": 2 * total / 8, "gradients": 2 * trained / 8, "optimizer states": 12 * trained / 8}
    for name, size in memory.items():
        assert printed(f"[=+] {name}", out) == pytest.approx(size, rel=0.005), name
    disk = {"20 models": 20 * 2 * total, "3 checkpoints": 3 * (2 * total + 2 * CLIP + 12 * trained)}
    for name, size in disk.items():
        assert printed(f"[=+] {name}", out) == pytest.approx(size, rel=0.005), name
    assert printed("disk at most: an estimate,", out) == pytest.approx(sum(disk.values()), rel=0.005)
    inputs = 16 * 2048 * 4096 * 2 + 32_064 * 4096 * 2  # of the loss, and the gradient of its weight
    assert printed("loss at most", out) == pytest.approx(512 * 2**20 + inputs, rel=0.005)
    assert 15 * total / 8 < sum(memory.values()) < 16 * total / 8  # 16 but for the frozen encoder
    # Of checkpointed layers their inputs remain, and one layer is computed again.
    kept = 16 * 2048 * 2 * (32 * 4096 + 8 * 4096 + 2 * 4096 + 4 * 11008)
    assert printed("activations", out) == pytest.approx(kept, rel=0.005)
    images = sum(sizes[name] for name in sizes if name != "sharegpt")
    flop = 6 * trained * tokens + 2 * CLIP * PATCHES * images
    assert amount(data["cotbal"][3:]) == pytest.approx(flop / (8 * 0.02e12 * 0.5), rel=0.005)
    whole = sum(amount(row[3:]) for row in data.values())
    assert printed("\ntime", out) == pytest.approx(whole, rel=0.005)
    assert printed("GPU time", out) == pytest.approx(8 * whole, rel=0.005)
    assert "8 GPU(s) of 0.02 TFLOP/s (--tflops), of which 50% are assumed to be reached" in out
    assert "counted with the model's tokenizer" in out


def test_lora_on_one_gpu(cotbal: Any, write_records: Any, llava_folder: Path) -> None:
    """Packed sequences, 16 a step; gradients and optimizer states of the updates and the projector alone."""
    records = write_records("cotbal_llava15_7b_lora.yaml")
    config = load_config(CONFIGS / "cotbal_llava15_7b_lora.yaml")
    rates = (config.training.learning_rate, config.training.learning_rates)
    assert rates == (2e-4, {"multi_modal_projector": 2e-5})  # LLaVA-1.5's LoRA fine-tuning
    assert config.model.images.aspect_ratio == "pad"
    out = dry_run(cotbal, "cotbal_llava15_7b_lora.yaml", llava_folder)
    counted = [length for found in records.values() for length in lengths(found, llava_folder)]
    sequences = len(pack([tokens for tokens, _ in counted], 2048, seed=0))
    assert 16 < sequences < len(counted) / 10
    plan, data = table(out, "records"), table(out, "sequences")
    assert (int(plan["cotbal"][0]), int(data["cotbal"][0])) == (len(counted), sequences)
    assert int(plan["cotbal"][1]) == math.ceil(math.ceil(sequences / 4) / 4)
    total, trained = VICUNA + PROJECTOR + CLIP, LORA + PROJECTOR
    assert printed(r"trained ([\d,]+)", out) == trained
    memory = {"parameters": 2 * (total + trained), "gradients": 2 * trained, "optimizer states": 12 * trained}
    for name, size in memory.items():
        assert printed(f"[=+] {name}", out) == pytest.approx(size, rel=0.005), name
    assert printed(" 3 checkpoints", out) == pytest.approx(3 * 16 * trained, rel=0.005)
    whole = printed("tokens: an estimate,", out)
    assert 20 < whole / GIB < 80  # of the one GPU
    tokens = sum(tokens for tokens, _ in counted)
    images = sum(len(found) for name, found in records.items() if name != "sharegpt")
    flop = (4 * (VICUNA + PROJECTOR) + 2 * trained) * tokens + 2 * CLIP * PATCHES * images
    if not torch.cuda.is_available():
        assert "1 GPU(s) of 312 TFLOP/s (no GPU here: assumed, as of an A100), of which 40% are assumed" in out
        assert amount(data["cotbal"][3:]) == pytest.approx(flop / (312e12 * 0.4), rel=0.005, abs=0.5)


@pytest.mark.parametrize(("stage", "offload"), [(3, "parameters"), (3, "optimizer"), (2, "optimizer")])
def test_offload_to_the_host(cotbal: Any, write_records: Any, llava_folder: Path, stage: int, offload: str) -> None:
    """Against DeepSpeed's own arithmetic, without the buffers that it allows for."""
    write_records("cotbal_llava15_7b.yaml")
    options = {"zero_stage": stage, "offload": offload}
    more = [word for key, value in options.items() for word in ("--set", f"training.{key}={value}")]
    out = dry_run(cotbal, "cotbal_llava15_7b.yaml", llava_folder, "--set", "model.freeze=[]", *more)
    total = VICUNA + PROJECTOR + CLIP
    if stage == 3:
        wanted = estimate_zero3_model_states_mem_needs(
            total, 0, 8, cpu_offload=True, cpu_offload_params=offload == "parameters", additional_buffer_factor=1
        )
    else:
        # One machine's 8 GPUs would each load a float32 model at first, 4 bytes times 8; that is over before training.
        wanted = estimate_zero2_model_states_mem_needs(total, 4, cpu_offload=True, additional_buffer_factor=1)
    assert printed("memory of the host: an estimate,", out) == pytest.approx(wanted[0], rel=0.005)
    on_gpu = out.split("memory of the host")[0]
    if wanted[1]:
        assert printed("= parameters", on_gpu) == pytest.approx(wanted[1], rel=0.005)
    else:
        assert "= activations" in on_gpu
    assert "gradients" not in on_gpu
    assert "optimizer states" not in on_gpu


def test_several_machines(cotbal: Any, write_records: Any, llava_folder: Path) -> None:
    """Two trainings at once, each on two machines of eight GPUs: half the steps, states, host memory and time."""
    write_records("cotbal_llava15_7b.yaml")
    options = ["--tflops", "0.01", "--set", "training.offload=optimizer"]
    one = dry_run(cotbal, "cotbal_llava15_7b.yaml", llava_folder, *options)
    launch = ["--set", "launch.nodes=4", "--set", "launch.nodes_per_training=2"]
    four = dry_run(cotbal, "cotbal_llava15_7b.yaml", llava_folder, *options, *launch)
    records = int(table(one, "records")["cotbal"][0])
    assert int(table(four, "records")["cotbal"][1]) == math.ceil(records / (16 * 16))
    for line in ("\ntime", "memory of the host: an estimate,"):
        assert printed(line, four) == pytest.approx(printed(line, one) / 2, rel=0.01), line
    assert printed("GPU time", four) == pytest.approx(printed("GPU time", one), rel=0.01)
    times = [amount(row[3:]) for row in table(four, "samples").values()]
    assert printed("at least", four) == pytest.approx(max(sum(times) / 2, max(times)), rel=0.005)
    assert " with 2 at once, GPU time" in four
    assert printed(" 6 checkpoints", four) == pytest.approx(2 * printed(" 3 checkpoints", one), rel=0.01)
    assert "at once" not in one
    assert "on 16 GPU(s) of 0.01 TFLOP/s" in four


def test_coba(cotbal: Any, write_records: Any, qwen_folder: Path) -> None:
    """A text model, 160 sequences a step, ZeRO-2; the method of `cotbal train` is CoBa with the paper's options."""
    records = write_records("coba_qwen.yaml")
    config = load_config(CONFIGS / "coba_qwen.yaml")
    assert config.balancing.method == "coba"
    assert config.training.batch_size * config.training.gradient_accumulation_steps * config.launch.processes == 160
    options = [
        "--set",
        "balancing.validation.samples_per_task=40",
        "--methods",
        "uniform,coba,famo,famo_star",
        "--tflops",
        "0.001",
    ]
    out = dry_run(cotbal, "coba_qwen.yaml", qwen_folder, "--set", "model.max_length=192", *options)
    counted = [length for found in records.values() for length in lengths(found, qwen_folder)]
    sequences = len(pack([tokens for tokens, _ in counted], 192, seed=0))
    plan, data = table(out, "records"), table(out, "sequences")
    assert int(data["coba"][0]) == sequences
    assert int(plan["coba"][1]) == math.ceil(math.ceil(sequences / 80) / 2) > 1
    assert [int(word) for word in data["coba"][1:3]] == [sum(values) for values in zip(*counted, strict=True)]
    # Forward, backward, and FAMO's two forward passes more: 10 P instead of 6 P.
    times = {name: amount(row[3:]) for name, row in data.items()}
    assert times["famo"] == pytest.approx(10 / 6 * times["uniform"], rel=0.02)
    # 40 records of each task before the first step and after each, 2 P a token; CoBa all 3 for L(0), FAMO* those of the
    # update before again.
    each = sum(mean(tokens for tokens, _ in lengths(found, qwen_folder)) for found in records.values())
    steps, tokens = int(plan["coba"][1]), int(data["coba"][1])
    for name, passes in {"coba": 40 * (1 + steps) + 3, "famo_star": 40 * (1 + 2 * steps)}.items():
        assert times[name] / times["uniform"] == pytest.approx(1 + 2 * passes * each / (6 * tokens), abs=0.015), name
    assert ", 2 P a token of the forward passes that balancing methods add, on" in out
    assert printed(r"parameters ([\d,]+),", out) == printed(r"trained ([\d,]+)", out) == QWEN
    memory = {"parameters": 2 * QWEN, "gradients": 2 * QWEN / 8, "optimizer states": 12 * QWEN / 8}
    for name, size in memory.items():
        assert printed(f"[=+] {name}", out) == pytest.approx(size, rel=0.005), name


def test_overlong_records_are_left_out_of_the_plan(cotbal: Any, write_records: Any, qwen_folder: Path) -> None:
    records = write_records("coba_qwen.yaml")
    options = ["--set", "model.max_length=40", "--set", "training.packing=false", "--set", "training.overlong=drop"]
    options += ["--set", "training.epochs=2"]
    out = dry_run(cotbal, "coba_qwen.yaml", qwen_folder, *options)
    counted = [length for found in records.values() for length in lengths(found, qwen_folder)]
    kept = [tokens for tokens, _ in counted if tokens <= 40]
    assert 0 < len(kept) < len(counted)
    data = table(out, "samples")
    assert [int(word) for word in data["coba"][:2]] == [len(kept), 2 * sum(kept)]


def test_without_a_tokenizer_or_a_model(cotbal: Any, write_records: Any, llava_folder: Path, tmp_path: Path) -> None:
    """Characters are counted, and the output says so; with nothing at all there is no time."""
    write_records("cotbal_llava15_7b.yaml")
    (tmp_path / "bare").mkdir()
    shutil.copy(llava_folder / "config.json", tmp_path / "bare")
    record = {"id": "x", "image": "a.png", "conversations": [{"from": "human", "value": "<image>" + 33 * "q"},
                                                            {"from": "gpt", "value": 20 * "a"}]}  # fmt: skip
    (tmp_path / "data" / "records" / "gqa" / "train.jsonl").write_text(json.dumps(record))
    out = dry_run(cotbal, "cotbal_llava15_7b.yaml", tmp_path / "bare")
    # 40 characters of the question, 20 of the answer, its end, two turns' marks of 4, and the image.
    assert table(out, "samples")["stl-gqa"][:3] == ["1", str(10 + 5 + 1 + 8 + 576), "6"]
    assert "tokens are estimated: 4 characters a token, 576 tokens an image (no tokenizer" in out
    out = dry_run(cotbal, "cotbal_llava15_7b.yaml", tmp_path / "nothing")
    assert table(out, "samples")["stl-gqa"][3] == "-"
    assert "no config.json of" in out


def test_the_data_folder_is_asked_for(cotbal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COTBAL_DATA", raising=False)
    outcome = cotbal("run", CONFIGS / "coba_qwen.yaml", "--dry-run")
    assert outcome.code == 2
    assert "tasks.0.train needs the environment variable COTBAL_DATA, which is not set" in outcome.err
