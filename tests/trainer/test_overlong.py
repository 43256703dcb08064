"""Samples longer than ``model.max_length``: cut, refused or left out, and counted; lengths that are exact."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from PIL import Image

from trainer.config import parse_config
from trainer.data.ahead import tried
from trainer.data.collator import MixtureDataset
from trainer.data.encoding import ConversationEncoder
from trainer.data.lengths import SampleLength, measure_all, token_counter
from trainer.data.packing import PackedDataset
from trainer.data.records import Record, Turn
from trainer.errors import UserError
from trainer.models.loading import load_processor
from trainer.pipeline.planned_data import _by_characters
from trainer.pipeline.preflight import check_config, check_run, check_validation
from trainer.pipeline.progress import Progress
from trainer.pipeline.stages import StageContext
from trainer.task_config import TaskConfig
from trainer.tasks import load_task
from trainer.training import TrainingSpec, training_samples

LIMIT = 40
LONG = {1: 30, 3: 12, 6: 80}  # records of `chat`, and by how many words their last answer is longer


@pytest.fixture
def data(run_data: dict[str, Any], tiny_tasks: list[TaskConfig], tmp_path: Path) -> dict[str, Any]:
    """Two of eight chats get too long in their second answer, one in its first question: nothing to learn is left."""
    lines = tiny_tasks[2].train.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for number, words in LONG.items():
        turn = 0 if number == 6 else 3
        records[number]["conversations"][turn]["value"] += " and so on" * words
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run_data["tasks"][2]["train"] = str(tmp_path / "chat.jsonl")
    run_data["model"]["max_length"] = LIMIT
    return run_data


def counts(data: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    config = parse_config(data, "x")
    context = StageContext("check", 0, Progress(), Event())
    check_run(config, config.model.path, tmp_path / "tasks.json", context)
    return json.loads((tmp_path / "tasks.json").read_text())["tasks"][2]


def by_hand(data: dict[str, Any]) -> list[tuple[int, int]]:
    """(tokens, supervised tokens) of every chat uncut."""
    task = load_task(TaskConfig(**data["tasks"][2]))
    encoder = ConversationEncoder(load_processor(data["model"]["path"]), 10_000)
    samples = [encoder.training_sample(record, task.image_path) for record in task.train]
    return [(len(sample.input_ids), sample.supervised) for sample in samples]


def test_the_material_is_as_said(data: dict[str, Any]) -> None:
    assert [index for index, (tokens, _) in enumerate(by_hand(data)) if tokens > LIMIT] == list(LONG)


def test_truncate_needs_something_to_learn(data: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task 'chat', train .*: record 'chat-train-6': no supervised token within 40"):
        counts(data, tmp_path)


def test_truncate(data: dict[str, Any], tmp_path: Path) -> None:
    lines = Path(data["tasks"][2]["train"]).read_text().splitlines()
    del lines[6]
    Path(data["tasks"][2]["train"]).write_text("\n".join(lines))
    row = counts(data, tmp_path)
    uncut = by_hand(data)
    assert (row["truncated_records"], row["dropped_records"]) == (2, 0)
    assert row["tokens"] == sum(min(tokens, LIMIT) for tokens, _ in uncut)
    assert row["supervised_tokens"] == sum(s - max(0, tokens - LIMIT) for tokens, s in uncut)  # cut from the end
    assert check_config(parse_config(data, "x")).splitlines()[-1].split()[-1] == "2"


def test_drop(data: dict[str, Any], tmp_path: Path) -> None:
    data["training"]["overlong"] = "drop"
    row = counts(data, tmp_path)
    kept = [length for length in by_hand(data) if length[0] <= LIMIT]
    assert (row["truncated_records"], row["dropped_records"]) == (0, 3)
    assert (row["tokens"], row["supervised_tokens"]) == tuple(sum(values) for values in zip(*kept, strict=True))
    header, *_, chat = check_config(parse_config(data, "x")).splitlines()
    assert (header.split()[-1], chat.split()[-1]) == ("dropped", "3")


def test_drop_of_everything(data: dict[str, Any], tmp_path: Path) -> None:
    data["training"]["overlong"] = "drop"
    data["model"]["max_length"] = 16
    with pytest.raises(UserError, match=r"every train record is longer than model\.max_length = 16 tokens"):
        counts(data, tmp_path)


def test_refuse_names_them(data: dict[str, Any], tmp_path: Path) -> None:
    data["training"]["overlong"] = "refuse"
    with pytest.raises(UserError) as caught:
        counts(data, tmp_path)
    for number, line in zip(LONG, str(caught.value).splitlines()[1:], strict=True):
        assert f"chat.jsonl: record 'chat-train-{number}'" in line
    model = shutil.copytree(data["model"]["path"], tmp_path / "model")
    content = json.loads((model / "config.json").read_text())
    content["text_config"]["max_position_embeddings"] = 4000
    (model / "config.json").write_text(json.dumps(content))
    data["model"] |= {"path": str(model), "max_length": 4000}
    assert counts(data, tmp_path)["truncated_records"] == 0


def test_validation_records_too(data: dict[str, Any]) -> None:
    """For methods that train their weights on them."""
    path = Path(data["tasks"][2]["train"]).with_name("validation.jsonl")
    question = {"id": "v", "conversations": [{"from": "human", "value": "3?"}, {"from": "gpt", "value": "so " * 60}]}
    path.write_text(json.dumps(question))
    data["tasks"][2] |= {"auxiliary": False, "metric": "bleu", "validation": str(path), "test": None}
    data["training"]["overlong"] = "refuse"
    with pytest.raises(UserError, match=r"task 'chat', validation set .*: record 'v' is longer than"):
        check_validation(parse_config(data, "x"), data["model"]["path"], StageContext("c", 0, Progress(), Event()))


@pytest.mark.parametrize("packing", [False, True])
def test_what_a_training_iterates_over(data: dict[str, Any], tmp_path: Path, packing: bool) -> None:
    """Dropped samples are gone for good, sequences hold every other one once, and `samples.json` counts both."""
    data["training"] |= {"overlong": "drop", "packing": packing}
    config = parse_config(data, "x")
    assert not isinstance(config.tasks, str)
    spec = TrainingSpec(
        name="t", config=config, model_path=config.model.path, mixture="all", output_dir=tmp_path / "out"
    )
    tasks = [load_task(task) for task in config.tasks]
    encoder = ConversationEncoder(load_processor(config.model.path), LIMIT)
    for epochs, processes in ((1, 0), (2, 2), (2, 0)):  # kept are samples that this process encodes again
        spec.config.training.epochs = epochs
        found = training_samples(spec, encoder, tasks, [task.train for task in tasks], processes)
        index = next(n for n in range(len(found)) if not (found[n][0] if packing else found[n])["encoded"].image_inputs)
        first, second = (found[index][0] if packing else found[index] for _ in range(2))
        assert (first is second) == ((epochs, processes) == (2, 0))
    assert isinstance(found, PackedDataset if packing else MixtureDataset)
    samples = [sample for index in range(len(found)) for sample in (found[index] if packing else [found[index]])]
    chat = [tokens for tokens, _ in by_hand(data) if tokens <= LIMIT]
    lengths = {k: sorted(len(s["encoded"].input_ids) for s in samples if s["task_id"] == k) for k in range(3)}
    assert lengths[2] == sorted(chat)
    assert (len(lengths[0]), len(lengths[1])) == (8, 8)
    if packing:
        sequences = [sum(len(s["encoded"].input_ids) for s in found[index]) for index in range(len(found))]
        assert max(sequences) <= LIMIT
        assert len(found) < len(samples)
    summary = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert summary == {
        "samples": 21, "tokens": sum(map(sum, lengths.values())), "cut": 0, "dropped": 3,
        "supervised_tokens": sum(s["encoded"].supervised for s in samples),
        "sequences": len(found) if packing else None,
    }  # fmt: skip


def test_a_training_refuses_by_itself(data: dict[str, Any], tmp_path: Path) -> None:
    """Run by hand, it has no check stage before it."""
    data["training"]["overlong"] = "refuse"
    config = parse_config(data, "x")
    assert not isinstance(config.tasks, str)
    spec = TrainingSpec(name="t", config=config, model_path=config.model.path, mixture="all", output_dir=tmp_path)
    tasks = [load_task(task) for task in config.tasks]
    encoder = ConversationEncoder(load_processor(config.model.path), LIMIT)
    with pytest.raises(UserError, match=r"task 'chat': record 'chat-train-1' is longer.*\(and 2 more like it\)"):
        training_samples(spec, encoder, tasks, [task.train for task in tasks])


class TestCounter:
    def test_no_image_is_opened_where_all_are_alike(self, data: dict[str, Any], tmp_path: Path) -> None:
        config = parse_config(data, "x")
        assert not isinstance(config.tasks, str)
        task = load_task(config.tasks[0])
        processor = load_processor(config.model.path)
        counted = token_counter(processor, 10_000).training_sample(task.train[0], tmp_path.joinpath)
        whole = ConversationEncoder(processor, 10_000).training_sample(task.train[0], task.image_path)
        assert (counted.input_ids, counted.labels) == (whole.input_ids, whole.labels)

    def test_a_header_is_read_where_sizes_count(self, pixel_model: Path, tmp_path: Path) -> None:
        own = load_processor(str(pixel_model))

        class Tiles:
            """A processor that gives a wide image more tokens."""

            image_processor, tokenizer = own.image_processor, own.tokenizer
            chat_template, image_token = own.chat_template, "<image>"

            def __call__(self, text: list[str], images: list[list[Image.Image]], **options: Any) -> dict[str, Any]:
                count = sum(1 + picture.width // 300 for picture in images[0])
                return {"input_ids": torch.ones(1, count, dtype=torch.long)}

        counter = token_counter(Tiles(), 500)
        record = Record("a", ("a.png",), (Turn("<image>\nWhat?", "no"),), ())
        lengths = []
        for width in (10, 310, 950):
            Image.new("RGB", (width, 10)).save(tmp_path / "a.png")
            lengths.append(len(counter.training_sample(record, tmp_path.joinpath).input_ids))
        assert [length - lengths[0] for length in lengths] == [0, 1, 3]
        (tmp_path / "a.png").unlink()  # another check's to report
        assert len(counter.training_sample(record, tmp_path.joinpath).input_ids) == lengths[0]


def test_problems_of_all_samples_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(index: int) -> SampleLength:
        if index % 3 == 1:
            raise UserError(f"sample {index} is wrong")
        return SampleLength(index + 1, 1, False)

    assert [length.tokens for length in measure_all(1, measure)] == [1]
    with pytest.raises(UserError, match=r"^sample 1 is wrong \(and 2 more like it\)$"):
        measure_all(9, measure)
    monkeypatch.setattr("trainer.bars.LINE_EVERY", 0)  # of hundreds of thousands it takes minutes
    measure_all(1, measure)
    assert capsys.readouterr().err == "lengths: 1 of 1 samples\n"


def test_other_processes_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, errors among them, and on a training's random numbers it has no effect."""
    here, state = os.getpid(), torch.get_rng_state()

    def work(index: int) -> tuple[int, bool]:
        if index % 300 == 8:
            raise UserError(f"sample {index} is wrong")
        return index * index, os.getpid() == here

    def found(count: int, processes: int) -> tuple[list[int | str], set[bool]]:
        results = list(tried(work, range(0, 2 * count, 2), processes))
        return (
            [result if isinstance(result, str) else result[0] for result in results],
            {result[1] for result in results if not isinstance(result, str)},
        )

    expected = [f"sample {n} is wrong" if n % 300 == 8 else n * n for n in range(0, 2000, 2)]
    assert found(1000, 2) == (expected, {True})  # too few for others
    monkeypatch.setattr("trainer.data.ahead._WORTH", 1000)
    assert found(1000, 2) == (expected, {False})
    assert torch.equal(torch.get_rng_state(), state)


def test_an_estimate_by_characters_counts_the_system_message() -> None:
    """Four characters a token, and it carries no loss."""
    plain = Record("a", (), (Turn("What is it? " * 4, "A hat ..."),), ())
    found, more = (_by_characters(record, 576, 500, "truncate") for record in (plain, replace(plain, system="x" * 40)))
    assert (found.tokens, found.supervised) == (12 + 2 + 1 + 2 * 4, 2 + 1)
    assert (more.tokens, more.supervised) == (found.tokens + 10, found.supervised)
