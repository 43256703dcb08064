"""What is checked and counted before a run, what is no more than a warning, and good input that is left alone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from damage import TrainingStarted, change_record, longer
from PIL import Image

from trainer.config import parse_config
from trainer.data.encoding import IGNORE_INDEX, ConversationEncoder
from trainer.data.mixtures import mini_size
from trainer.data.records import Records
from trainer.errors import UserError
from trainer.models.loading import load_processor
from trainer.pipeline.algorithm1 import Pipeline
from trainer.pipeline.preflight import CheckedTask, TokenCount, check_config, check_run, token_counter
from trainer.pipeline.progress import Progress
from trainer.pipeline.stages import StageContext
from trainer.task_config import TaskConfig
from trainer.tasks import Task, TaskImages, check_images, load_task
from trainer.units import byte_size


def blind(row: dict[str, Any]) -> None:
    del row["image"]
    row["conversations"][0]["value"] = "What colour is it?"


@pytest.mark.parametrize("packing", [False, True])
def test_shared_memory_is_measured(copied_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, packing: bool) -> None:
    """Three processes of each of two trainings hand over two batches each, of four samples with an image of 3 x 64 x 64
    float32 numbers, or of four sequences of 128 tokens with as many images as fit."""
    copied_run["training"] |= {"dataloader_workers": 3, "packing": packing}
    copied_run["launch"]["parallel"] = 2
    config = parse_config(copied_run, "x")
    encoder = ConversationEncoder(load_processor(copied_run["model"]["path"]), 128)
    largest = 0.0
    for task in map(load_task, config.tasks[:2]):
        tokens = np.mean([len(encoder.training_sample(own, task.image_path).input_ids) for own in task.train])
        batch = 4 * (4 * 3 * 64 * 64 + 32 * tokens)
        largest = max(largest, batch * 128 / tokens if packing else batch)
    needed = 3 * 2 * 2 * largest
    for free, enough in ((1.02 * needed, True), (0.98 * needed, False)):
        monkeypatch.setattr("trainer.data.ahead.shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if enough:
            check_config(config)
            continue
        with pytest.raises(UserError) as caught:
            check_config(config)
        told = f"/dev/shm has {byte_size(free)} free, and 6 processes that encode samples hand over about "
        assert str(caught.value) == (
            f"{told}{byte_size(needed)} there; make it larger (docker's --shm-size), or lower "
            "training.dataloader_workers; 0 needs none of it"
        )
        check_config(
            config.model_copy(update={"training": config.training.model_copy(update={"dataloader_workers": 0})})
        )


def test_a_generated_answer_needs_no_room(copied_run: dict[str, Any], data_copy: Path) -> None:
    """Prompts are never cut, so only perplexity minds that a record is long."""
    change_record(data_copy, "colour_test", 1, longer)
    assert check_config(parse_config(copied_run, "x"))


@pytest.mark.parametrize("packing", [False, True])
def test_good_input_gets_as_far_as_the_first_training(
    copied_run: dict[str, Any], packing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control: damage is what stops the runs of test_bad_input.py. Trainings of few steps are named each time."""
    copied_run["training"] |= {"packing": packing, "batch_size": 2}
    config = parse_config(copied_run, "x")
    sizes = {"mini": 3 * 2, "stl-colour": 8, "stl-box": 8, "plus-colour": 8 + 4, "plus-box": 8 + 4}
    if packing:  # at least: full sequences of 128 tokens, of which a mini is a quarter
        tokens = {task["name"]: row[1] for task, row in zip(copied_run["tasks"], counted(copied_run), strict=True)}
        full = {name: math.ceil(count / 128) for name, count in tokens.items()}
        minis = {name: mini_size(size, 0.25) for name, size in full.items()}
        sizes = {"mini": sum(minis.values()), "cotbal": sum(full.values()), "ew": sum(full.values())}
        for name in ("colour", "box"):
            sizes |= {f"stl-{name}": full[name], f"plus-{name}": sizes["mini"] - minis[name] + full[name]}
    steps = {name: math.ceil(size / 2) for name, size in sizes.items()}
    for _ in range(2):
        capsys.readouterr()
        pipeline = Pipeline(config)
        with pytest.raises(TrainingStarted):
            pipeline.run()
        assert [path.name for path in (pipeline.run_dir / "trainings").iterdir()] == ["mini"]
        said = capsys.readouterr().err
        assert f"] run directory: {copied_run['output_dir']}\n" in said
        assert said.count("warning: fewer than 10 optimizer steps") == 1
        named = said.partition("teach little: ")[2].partition(";")[0].split(", ")
        assert dict(name.split() for name in named) == {name: str(count) for name, count in steps.items() if count < 10}


def counted(data: dict[str, Any]) -> list[tuple[int, int]]:
    """(supervised tokens, tokens) of every task's training records, from the pixels themselves."""
    encoder = ConversationEncoder(load_processor(data["model"]["path"]), 10_000)
    found = []
    for config in data["tasks"]:
        task = load_task(TaskConfig(**config))
        samples = [encoder.training_sample(record, task.image_path) for record in task.train]
        labels = [label for sample in samples for label in sample.labels]
        found.append((sum(label != IGNORE_INDEX for label in labels), len(labels)))
    return found


def test_check_prints_what_is_there(copied_run: dict[str, Any]) -> None:
    header, *rows = check_config(parse_config(copied_run, "x")).splitlines()
    assert header.split() == ["task", "metric", "train", "valid.", "test", "images", "supervised", "cut"]
    supervised = [str(count) for count, _ in counted(copied_run)]
    assert [row.split() for row in rows] == [
        ["colour", "exact_match", "8", "4", "4", "8/4/4", supervised[0], "0"],
        ["box", "accuracy_iou", "8", "4", "4", "8/4/4", supervised[1], "0"],
        ["chat", "auxiliary", "8", "4", "4", "0/0/0", supervised[2], "0"],
    ]


def test_numbers_of_large_data_stay_apart(copied_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    own = TaskConfig(**copied_run["tasks"][0]).model_copy(update={"metric": "chartqa_relaxed"})
    train, validation, test = (cast(Records, range(count)) for count in (1_000_000, 214_354, 107_394))
    task = Task(own, train, validation, {"": test})
    images = TaskImages(9, {"train": 350_000, "validation": 214_354, "test": 107_394}, [])
    checked = CheckedTask(task, images, TokenCount(supervised=98_765_432, cut=123_456), [], 0.0)
    monkeypatch.setattr("trainer.pipeline.preflight.check_all", lambda *_: [checked])
    row = check_config(parse_config(copied_run, "x")).splitlines()[1]
    numbers = ["1000000", "214354", "107394", "350000/214354/107394", "98765432", "123456"]
    assert row.split() == ["colour", "chartqa_relaxed", *numbers]


def test_what_is_odd_is_a_warning(
    copied_run: dict[str, Any], data_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of it stops a run: it is printed by the check, and by the run itself."""
    for number in range(8):
        change_record(data_copy, "colour_train", number, blind)
    transparent = Image.new("RGBA", (64, 64), (9, 9, 9, 100))
    for name in ("box_train_2", "box_test_1"):
        transparent.save(data_copy / "images" / f"{name}.png")
    change_record(
        data_copy, "chat_train", 3, lambda row: row["conversations"][1].update(value="It is </s> 3 <|user|>.")
    )
    for number in (2, 5):
        change_record(data_copy, "chat_train", number, lambda row: row["conversations"][3].update(value=" "))
    last = json.loads((data_copy / "chat_train.jsonl").read_text().splitlines()[7])
    for number in (1, 6):
        change_record(data_copy, "chat_train", number, lambda row: row.update(last))
    flat = "[0.5, 0.5, 0.5, 0.9]"  # a box without area, as rounding makes them
    change_record(data_copy, "box_validation", 2, lambda row: row["conversations"][1].update(value=flat))
    for number in (0, 3):
        change_record(
            data_copy, "box_test", number, lambda row: row.update(image=row["image"].replace("test", "train"))
        )
    config = parse_config(copied_run, "x")
    told = [line for line in check_config(config).splitlines() if line.startswith("warning: ")]
    hidden = "has transparent pixels, seen in the colour that they hide; flatten it onto a background"
    image = data_copy / "images"
    assert told == [
        "warning: task 'colour': validation or test records have images, training records have none",
        f"warning: task 'box', validation set {data_copy / 'box_validation.jsonl'}: record 'box-validation-2': its "
        f"correct answer '{flat}' itself scores 0 under accuracy_iou",
        f"warning: task 'box', test set {data_copy / 'box_test.jsonl'}: 2 of 4 records are trained on, with the same "
        "answer",
        "warning: task 'box': 2 images of training records are in validation or test records too, such as "
        "images/box_train_0.png: scores may be too good",
        f"warning: task 'box', train record 'box-train-2': image {image / 'box_train_2.png'} {hidden}",
        f"warning: task 'box', test record 'box-test-1': image {image / 'box_test_1.png'} {hidden}",
        "warning: task 'chat', train record 'chat-train-2': of 2 answers, 2 is empty: the model learns to end at once "
        "(and 1 more like it)",
        "warning: task 'chat', train record 'chat-train-3': its text has '</s>', '<|user|>', which the tokenizer takes "
        "for special tokens; spell it otherwise",
        f"warning: task 'chat', train set {data_copy / 'chat_train.jsonl'}: 2 of 8 records are the same in everything "
        "as an earlier one",
    ]
    check_run(config, config.model.path, tmp_path / "tasks.json", StageContext("check", 0, Progress(), Event()))
    assert [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines() if "warning: " in line] == told


def test_what_the_run_keeps_of_it(copied_run: dict[str, Any], tmp_path: Path) -> None:
    config = parse_config(copied_run, "x")
    context = StageContext("check", 0, Progress(), Event())
    check_run(config, config.model.path, tmp_path / "tasks.json", context)
    rows = json.loads((tmp_path / "tasks.json").read_text())["tasks"]
    assert [(row["name"], row["metric"], row["auxiliary"], row["images"]) for row in rows] == [
        ("colour", "exact_match", False, 16), ("box", "accuracy_iou", False, 16), ("chat", None, True, 0),
    ]  # fmt: skip
    assert [(row["supervised_tokens"], row["tokens"]) for row in rows] == counted(copied_run)
    assert all((row["train_records"], row["test_records"], row["truncated_records"]) == (8, 4, 0) for row in rows)


def test_counting_tokens_opens_no_image(copied_run: dict[str, Any], data_copy: Path) -> None:
    encoder = token_counter(load_processor(copied_run["model"]["path"]), 128)
    task = load_task(TaskConfig(**copied_run["tasks"][0]))
    shutil.rmtree(data_copy / "images")
    assert encoder.training_sample(task.train[0], task.image_path).supervised > 0


def test_each_image_is_opened_once_and_links_may_lead_elsewhere(copied_run: dict[str, Any], data_copy: Path) -> None:
    """LLaVA's data folders are usually made of links to where the images really are."""
    shutil.move(data_copy / "images", data_copy.parent / "elsewhere")
    (data_copy / "images").symlink_to(data_copy.parent / "elsewhere")
    change_record(data_copy, "box_train", 0, lambda row: row.update(image="images/box_train_1.png"))
    images = check_images(load_task(TaskConfig(**copied_run["tasks"][1])))
    assert (images.count, images.by_split) == (15, {"train": 7, "validation": 4, "test": 4})
    assert not images.warnings
    for split, image in (("validation", "box_train_3"), ("test", "box_train_1")):
        change_record(data_copy, f"box_{split}", 0, lambda row, image=image: row.update(image=f"images/{image}.png"))
    (warning,) = check_images(load_task(TaskConfig(**copied_run["tasks"][1]))).warnings
    assert warning.startswith(
        "task 'box': 2 images of training records are in validation or test records too, such as "
    )
    assert "images/box_train_1.png" in warning
