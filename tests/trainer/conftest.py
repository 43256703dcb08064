"""Small material on disk that the trainer's tests share: three tasks, and two model folders to read them with."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from damage import run_on_copy
from followers import Followers, MakeConfig
from hypothesis import HealthCheck, settings
from PIL import Image, ImageDraw
from questions import write_questions
from small_run import small_run
from stand_ins import Runs, pipeline_on

import trainer.cli
from trainer.config import RunConfig, TinyLlavaConfig, parse_config
from trainer.data.encoding import ConversationEncoder
from trainer.evaluation.running import evaluate
from trainer.evaluation.spec import EvaluationSet, EvaluationSpec
from trainer.models.loading import load_processor
from trainer.models.tiny_llava import CHAT_TEMPLATE, train_tokenizer, write_tiny_llava
from trainer.task_config import TaskConfig

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# How long an example takes says nothing on a machine that other work shares.
settings.register_profile("trainer", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trainer")

COLOURS = {"red": (220, 30, 30), "green": (20, 160, 60), "blue": (30, 60, 220), "yellow": (240, 220, 40)}
COUNTS = {"train": 8, "validation": 4, "test": 4}
# A table of validation scores: what `cotbal weights` takes.
SCORES: dict[str, Any] = {
    "tasks": ["a", "b"],
    "mini": {"a": 0.31, "b": 0.2},
    "full": {"a": {"a": 0.6, "b": 0.25}, "b": {"a": 0.35, "b": 0.5}},
}
SIDE = 64  # pixels of an image, two by two patches of either tower


def _colour(folder: Path, split: str, number: int) -> dict[str, Any]:
    name = list(COLOURS)[number % len(COLOURS)]
    Image.new("RGB", (SIDE, SIDE), COLOURS[name]).save(folder / "images" / f"colour_{split}_{number}.png")
    return {
        "id": f"colour-{split}-{number}",
        "image": f"images/colour_{split}_{number}.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat colour is it? Answer with one word."},
            {"from": "gpt", "value": name},
        ],
    }


def _grounding(folder: Path, split: str, number: int) -> dict[str, Any]:
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    x, y = 8 * (number % 4), 8 * (number // 4)
    ImageDraw.Draw(picture).rectangle((x, y, x + 31, y + 31), fill="black")
    picture.save(folder / "images" / f"box_{split}_{number}.png")
    box = ", ".join(f"{value / SIDE:.2f}" for value in (x, y, x + 32, y + 32))
    return {
        "id": f"box-{split}-{number}",
        "image": f"images/box_{split}_{number}.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhere is the black square?"},
            {"from": "gpt", "value": f"[{box}]"},
        ],
    }


def _chat(folder: Path, split: str, number: int) -> dict[str, Any]:
    return {
        "id": f"chat-{split}-{number}",
        "conversations": [
            {"from": "human", "value": f"How much is {number} plus one?"},
            {"from": "gpt", "value": f"It is {number + 1}."},
            {"from": "human", "value": "Are you sure?"},
            {"from": "gpt", "value": "Yes, quite sure."},
        ],
    }


@pytest.fixture(scope="session")
def tiny_tasks(tmp_path_factory: pytest.TempPathFactory) -> list[TaskConfig]:
    """``colour`` (exact match), ``box`` (grounding) and ``chat`` (text only, two turns, auxiliary), in that order."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "images").mkdir()
    for name, draw in (("colour", _colour), ("box", _grounding), ("chat", _chat)):
        for split, count in COUNTS.items():
            rows = [draw(folder, split, number) for number in range(count)]
            (folder / f"{name}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def task(name: str, **options: Any) -> TaskConfig:
        files = {split: folder / f"{name}_{split}.jsonl" for split in COUNTS}
        return TaskConfig(name=name, image_root=folder, max_new_tokens=12, **files, **options)

    return [task("colour", metric="exact_match"), task("box", metric="accuracy_iou"), task("chat", auxiliary=True)]


@pytest.fixture(scope="session")
def texts(tiny_tasks: list[TaskConfig]) -> list[str]:
    """Every turn of every training record, for a tokenizer."""
    rows = [json.loads(line) for task in tiny_tasks for line in task.train.read_text().splitlines()]
    return [" " + turn["value"].replace("<image>", "").strip() for row in rows for turn in row["conversations"]]


@pytest.fixture(scope="session")
def feature_model(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """The built-in LLaVA at its smallest; its tower takes features in place of pixels."""
    folder = tmp_path_factory.mktemp("feature_model")
    size = TinyLlavaConfig(hidden_size=32, layers=1, heads=2, vocabulary=340)
    write_tiny_llava(folder, texts, size, image_size=SIDE, max_length=256, seed=0)
    return folder


@pytest.fixture(scope="session")
def pixel_model(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A LLaVA as transformers ships it, with a CLIP tower, made from a configuration; it takes pixels only."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = train_tokenizer(texts, 340)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
            patch_size=SIDE // 2, projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        ),
        image_token_index=int(tokenizer.vocab["<image>"]),
        image_seq_length=4,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    folder = tmp_path_factory.mktemp("pixel_model")
    model.save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, do_center_crop=False, crop_size=side),
        tokenizer=tokenizer,
        patch_size=SIDE // 2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def processor(pixel_model: Path) -> Any:
    """Of the pixel model."""
    return load_processor(str(pixel_model))


@pytest.fixture
def encoder(processor: Any) -> ConversationEncoder:
    return ConversationEncoder(processor, 200)


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``mixed.jsonl`` and its images."""
    return write_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="session")
def make_spec(questions: Path, pixel_model: Path) -> Callable[..., EvaluationSpec]:
    """A specification on one rank; batches of 4, so that most batches are padded."""

    def make(output: Path, **changes: Any) -> EvaluationSpec:
        own = {"metrics": ("exact_match",), "limit": None} | {
            key: changes.pop(key) for key in ("metrics", "limit") if key in changes
        }
        chosen = EvaluationSet("predictions", (questions / "mixed.jsonl",), questions, max_new_tokens=9, **own)
        base = EvaluationSpec(pixel_model, (chosen,), output, 4, "fp32", ("cpu",), threads=1, max_length=256)
        return replace(base, **changes)

    return make


@pytest.fixture(scope="session")
def answers(make_spec: Callable[..., EvaluationSpec], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation on one rank, never interrupted."""
    output = tmp_path_factory.mktemp("answers")
    evaluate(make_spec(output))
    return output


@pytest.fixture
def run_data(tiny_tasks: list[TaskConfig], pixel_model: Path, tmp_path: Path) -> dict[str, Any]:
    """The three tasks on the pixel model."""
    return small_run(tiny_tasks, pixel_model, tmp_path / "run")


@pytest.fixture
def data_copy(tiny_tasks: list[TaskConfig], tmp_path: Path) -> Path:
    """A copy of the tasks' data that a test may damage."""
    return Path(shutil.copytree(tiny_tasks[0].image_root, tmp_path / "data"))


@pytest.fixture
def copied_run(run_data: dict[str, Any], data_copy: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The run on that copy, which ends where a training would start."""
    return run_on_copy(run_data, data_copy, monkeypatch)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """What trainings and evaluations are from here on."""
    return Runs(monkeypatch)


@pytest.fixture
def run_stand_ins(run_data: dict[str, Any], runs: Runs) -> Callable[..., Path]:
    return pipeline_on(run_data)


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes a mapping as ``config.yaml`` and returns its path."""

    def write(data: dict[str, Any]) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


@dataclass(frozen=True)
class Outcome:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def cotbal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Runs the console entry point in this process, its treatment of errors included."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["cotbal", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            trainer.cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run_config(run_data: dict[str, Any]) -> RunConfig:
    return parse_config(run_data, "the tests' configuration")


@pytest.fixture
def followers() -> Iterator[Followers]:
    found = Followers()
    yield found
    found.join()


@pytest.fixture
def make_config(run_data: dict[str, Any]) -> MakeConfig:
    """The run's configuration, with changes to ``launch``."""

    def make(**launch: Any) -> RunConfig:
        return parse_config(run_data | {"launch": run_data["launch"] | launch}, "test")

    return make


@pytest.fixture
def scores(tmp_path: Path) -> Callable[..., Path]:
    """Writes the score table, changed as told, and returns its path."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "scores.json"
        path.write_text(json.dumps(SCORES | changes))
        return path

    return write


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laying out a report's four figures takes seconds; tests of tables and messages do without."""
    monkeypatch.setattr("trainer.report.plots.svg", lambda figure, label: f'<svg aria-label="{label}"></svg>')
