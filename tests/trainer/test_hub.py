"""Models of a hub: which files come, which commit a run stays with, and what is said where the hub does not give it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub
from huggingface_hub import constants
from stand_ins import Runs, pipeline_on, read
from transformers import AutoModelForImageTextToText

from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.models.hub import model_folder, pinned
from trainer.models.loading import load_config, load_model, load_processor
from trainer.task_config import TaskConfig

NAME = "someone/tiny-llava"
SAFE, SHARD = "model.safetensors", "model-00001-of-0000"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub without models, and an empty cache."""
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.close()


@pytest.fixture
def changed(pixel_model: Path, tmp_path: Path) -> Path:
    """Another model of the same form: every weight is doubled."""
    folder = Path(shutil.copytree(pixel_model, tmp_path / "changed"))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.save_pretrained(folder)
    return folder


def weights(path: str) -> dict[str, torch.Tensor]:
    return dict(load_model(path, ModelConfig(freeze=[]), torch.float32).state_dict())


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("form", ["one file", "shards", "bin"])
def test_only_the_weights_that_are_loaded_come(hub: Hub, pixel_model: Path, tmp_path: Path, form: str) -> None:
    """Beside them lie others, which would take the space of the model once more each."""
    source = Path(shutil.copytree(pixel_model, tmp_path / "source"))
    model = AutoModelForImageTextToText.from_pretrained(source)
    if form == "shards":
        (source / SAFE).unlink()
        model.save_pretrained(source, max_shard_size="40KB")
    if form == "bin":
        (source / SAFE).unlink()
        torch.save(model.state_dict(), source / "pytorch_model.bin")
    expected = sorted(file.name for file in source.iterdir() if file.suffix in (".safetensors", ".bin"))
    assert len(expected) > 1 if form == "shards" else len(expected) == 1
    (source / "original").mkdir()
    for other in ("consolidated.safetensors", "model.gguf", "original/consolidated.00.pth", "tf_model.h5"):
        (source / other).write_text("large")
    if form != "bin":
        (source / "pytorch_model.bin").write_text("large")
    commit = hub.push(NAME, source)

    config, processor = load_config(NAME), load_processor(NAME)
    assert config.to_diff_dict() == load_config(str(source)).to_diff_dict()
    assert processor.tokenizer.get_vocab() == load_processor(str(pixel_model)).tokenizer.get_vocab()
    assert not [name for name in hub.sent if name in expected]
    assert same(weights(NAME), weights(str(pixel_model)))
    large = [name for name in hub.sent if Path(name).suffix in (".safetensors", ".bin", ".gguf", ".pth", ".h5")]
    assert sorted(large) == expected
    assert model_folder(f"{NAME}@{commit}", weights=True, local_only=True) == model_folder(NAME)


def test_a_run_stays_with_one_commit(
    hub: Hub, run_data: dict[str, Any], pixel_model: Path, changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with what it trains days later, when main is another model; and where that one is asked for, it is it."""
    first = hub.push(NAME, pixel_model)
    run_data["model"]["path"] = NAME
    go, runs = pipeline_on(run_data), Runs(monkeypatch)
    run = go()
    second = hub.push(NAME, changed)
    before = len(runs.trained)
    go(comparisons=["ew", "rlw"])
    assert runs.trained[before:] == ["rlw"]
    used = {path.parent.name: read(path)["model_path"] for path in run.glob("trainings/*/spec.json")}
    assert len(used) > 4
    assert set(used.values()) == {f"{NAME}@{first}"}
    assert read(run / "environment.json")["model"] == f"{NAME}@{first}"
    assert f"{NAME}@{first}" in (run / "report.html").read_text().replace("<wbr>", "")
    assert same(weights(used["rlw"]), weights(str(pixel_model)))
    run_data["model"]["path"] = f"{NAME}@{second}"
    go(overwrite=True)
    assert read(run / "trainings/ew/spec.json")["model_path"] == f"{NAME}@{second}"
    assert same(weights(f"{NAME}@{second}"), weights(str(changed)))
    assert not same(weights(str(changed)), weights(str(pixel_model)))


def test_a_finished_model_is_taken_without_a_hub(
    hub: Hub, pixel_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process of every training asks for it: a commit that is here whole costs no request."""
    hub.push(NAME, pixel_model)
    found = pinned(NAME, tmp_path / "record.json")
    model_folder(found, weights=True)
    asked = hub.asked
    assert same(weights(found), weights(str(pixel_model)))
    assert hub.asked == asked
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert pinned(NAME, tmp_path / "record.json") == found
    assert pinned(NAME, tmp_path / "other.json") == found  # a new run: the branch as it was last seen
    load_processor(NAME, local_only=True)


def test_weights_come_after_all_else_is_right(
    hub: Hub, run_data: dict[str, Any], pixel_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then they are looked at, before anything is trained."""
    source = Path(shutil.copytree(pixel_model, tmp_path / "source"))
    configuration = json.loads((source / "config.json").read_text())
    configuration["text_config"]["intermediate_size"] += 8
    (source / "config.json").write_text(json.dumps(configuration))
    hub.push(NAME, source)
    run_data["model"]["path"] = NAME
    runs, go = Runs(monkeypatch), pipeline_on(run_data)
    with pytest.raises(UserError, match="positions"):
        go(model={"path": NAME, "max_length": 100_000})
    assert SAFE not in hub.sent
    with pytest.raises(UserError, match=r"its weights have other shapes than its config\.json says"):
        go()
    assert SAFE in hub.sent
    assert not runs.trained


def test_evaluation_of_a_hub_model(
    hub: Hub, cotbal: Callable[..., Any], pixel_model: Path, tiny_tasks: list[TaskConfig], tmp_path: Path
) -> None:
    """What a pretrained model scores before any tuning."""
    hub.push(NAME, pixel_model)
    answers = {}
    for number, model in enumerate((NAME, str(pixel_model))):
        output = tmp_path / f"scores{number}"
        outcome = cotbal(
            "evaluate", model, "--records", tiny_tasks[0].test, "--image-root", tiny_tasks[0].image_root, "--limit", 2,
            "--metric", "exact_match", "--max-new-tokens", 3, "--device", "cpu", "--precision", "fp32",
            "--output", output,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        answers[model] = (output / "predictions.jsonl").read_text()
    assert answers[NAME] == answers[str(pixel_model)]
    assert answers[NAME].count("\n") == 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("someone/unknown", "no such folder, and the hub has no model 'someone/unknown'; if it is a private one"),
        (f"{NAME}@v9", "has no branch, tag or commit 'v9' on the hub"),
        ("someone/gated", "only to those who have accepted its terms; accept them on its page"),
        ("/no/such/folder", "no such folder, and no name on a hub could be '/no/such/folder'"),
        ("models/my llava", "no such folder, and no name on a hub could be 'models/my llava'"),
    ],
)
def test_what_a_hub_does_not_give(hub: Hub, pixel_model: Path, path: str, message: str) -> None:
    for name in (NAME, "someone/gated"):
        hub.push(name, pixel_model)
    hub.gated.add("someone/gated")
    for load in (load_config, load_processor, lambda path: pinned(path, Path("record.json"))):
        with pytest.raises(UserError, match=rf"^model.path '{path}': .*{message}"):
            load(path)
    assert not Path("record.json").exists()


def test_without_a_hub(hub: Hub, pixel_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(NAME, pixel_model)
    with pytest.raises(UserError, match=r"nor a downloaded model of that name on this machine \(") as told:
        load_config(NAME, local_only=True)
    assert hub.asked == 0
    assert "\n" not in str(told.value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="on this machine, and the hub cannot be reached"):
        load_config(NAME)


def test_an_adapter_of_a_hub_is_refused_by_its_name(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    hub.push(NAME, tmp_path / "adapter")
    with pytest.raises(UserError, match=f"model.path '{NAME}': it holds an adapter of PEFT"):
        load_config(NAME)
