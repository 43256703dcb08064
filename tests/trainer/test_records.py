"""Reading records: what is right loads unchanged, into little memory, and each task and split gets its own."""

from __future__ import annotations

import codecs
import gc
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from record_files import GPT, HUMAN, LLAVA, record, written

from trainer.config import RunConfig
from trainer.data.records import Record, Records, Turn, read_file, read_records, write_jsonl
from trainer.errors import UserError
from trainer.pipeline.evaluations import evaluation_sets
from trainer.pipeline.planned_data import planned_data
from trainer.pipeline.preflight import check_all
from trainer.task_config import TaskConfig
from trainer.tasks import load_task, load_tasks, scan_task


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava_files_load_unchanged(tmp_path: Path, suffix: str) -> None:
    found = read_records(written(tmp_path, LLAVA, suffix))
    for loaded, row in zip(found, LLAVA, strict=True):
        assert loaded.id == str(row["id"])
        assert list(loaded.images) == ([row["image"]] if "image" in row else [])
        values = [text for turn in loaded.turns for text in (turn.question, turn.answer)]
        assert values == [message["value"] for message in row["conversations"]]
        assert loaded.references == ()


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_byte_order_mark_is_no_damage(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, LLAVA, suffix)
    plain = read_records(path)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert read_records(path) == plain


def test_other_spellings(tmp_path: Path) -> None:
    plain, twice = {"from": "human", "value": "q"}, {"from": "user", "value": "<image><image> q"}
    that = {"from": "gpt", "value": "That."}
    rows = [
        {"id": "a", "image": None, "conversations": [plain, {"from": "assistant", "value": "x"}]},
        {"id": "b", "image": ["1.png", "2.png"], "conversations": [twice, GPT]},
        {"id": "c", "image": "1.png", "conversations": [plain, GPT]},
        {"id": "d", "conversations": [plain, GPT], "references": ["x", "y"]},
        {"id": "s", "conversations": [{"from": "system", "value": "Be brief."}, plain, GPT, plain, that]},
        {"id": "e", "images": ["1.png"], "image": "", "img": None, "conversations": [plain, GPT]},
        {"id": "f", "images": "1.png", "conversations": [HUMAN, GPT]},
        {"id": "g", "images": [], "image": "2.png", "video": "", "conversations": [HUMAN, GPT]},
    ]
    path = written(tmp_path, rows, ".jsonl")
    path.write_text("\n" + path.read_text().replace("\n", "\n\n"))  # blank lines are nothing
    a, b, c, d, s, e, f, g = read_records(path)
    assert a == Record("a", (), (Turn("q", "x"),), ())
    assert b.images == ("1.png", "2.png")
    assert c.turns == (Turn("<image>\nq", "This."),)  # an export without the placeholder: the image comes first
    assert (a.answers, d.answers) == (["x"], ["x", "y"])
    assert s == Record("s", (), (Turn("q", "This."), Turn("q", "That.")), (), "Be brief.")
    assert s.answers == ["That."]
    assert (e.images, e.turns) == (c.images, c.turns)
    assert (f.images, g.images) == (("1.png",), ("2.png",))


def test_where_images_is_an_empty_list_a_placeholder_is_text(tmp_path: Path) -> None:
    said = ["Of <image> only.", "<image> or <image/>?", "<image>"]
    turns = [{"from": side, "value": text} for side, text in zip(("system", "human", "gpt"), said, strict=True)]
    rows = [{"id": "svg", "images": [], "conversations": turns}]
    assert read_records(written(tmp_path, rows, ".jsonl")) == [Record("svg", (), (Turn(*said[1:]),), (), said[0])]


def test_one_empty_gpt_turn_among_others_is_fine(tmp_path: Path) -> None:
    rows = [record(conversations=[HUMAN, {"from": "gpt", "value": ""}, {"from": "human", "value": "And?"}, GPT])]
    assert [turn.answer for turn in read_records(written(tmp_path, rows, ".json"))[0].turns] == ["", "This."]


def test_ids_may_repeat_where_nothing_is_scored(tmp_path: Path) -> None:
    """LLaVA-1.5's mixture has several conversations with the id of their image."""
    rows = [record(), record(conversations=[HUMAN, {"from": "gpt", "value": "That."}]), record(), LLAVA[1]]
    path = written(tmp_path, rows, ".jsonl")
    config = TaskConfig(name="a", train=path, validation=path, metric="cider", image_root=tmp_path)
    task, problems = scan_task(config)
    assert [turn.answer for found in task.train for turn in found.turns] == [
        "This.",
        "That.",
        "This.",  # the same in everything: a published file is taken as it is
        LLAVA[1]["conversations"][1]["value"],
    ]
    assert [len(task.train), len(task.validation)] == [4, 2]
    assert problems == [
        f"{path}, line {n}: id 'r7' is already used by {path}, line 1; ids must be unique" for n in (2, 3)
    ]


@pytest.mark.parametrize("metrics", [("perplexity", []), ("bleu", ["perplexity"]), ("perplexity", ["bleu"])])
def test_conversations_are_scored_by_losses_alone(tmp_path: Path, metrics: tuple[str, list[str]]) -> None:
    """Losses are of every answer; a generated one is of the last question, and the others would count for nothing."""
    path = written(
        tmp_path, [record(image="absent", conversations=[{"from": "human", "value": "?"}, GPT] * 2)], ".jsonl"
    )
    task, problems = scan_task(
        TaskConfig(name="a", train=path, validation=path, test=path, metric=metrics[0], test_metrics=metrics[1])
    )
    generated = [metrics[0] == "bleu", (metrics[1] or [metrics[0]]) == ["bleu"]]
    assert [len(task.validation), len(task.test)] == [1 - wrong for wrong in generated]
    assert [problem.split(",")[1].split()[0] for problem in problems] == [
        split for split, wrong in zip(("validation", "test"), generated, strict=True) if wrong
    ]
    assert all("or score perplexity, which takes every answer" in problem for problem in problems)


def test_a_file_of_several_tasks_gives_each_its_own(tmp_path: Path) -> None:
    """VisATB's authors train on one file whose records name their tasks."""
    rows = [record(id=f"{task}{n}", task=task) for n in range(3) for task in ("GQA", "VQAv2")]
    rows += [record(id="GQA0", task="VQAv2")]  # ids repeat between tasks
    path = written(tmp_path, rows, ".json")
    config = TaskConfig(name="GQA", train=path, validation=path, metric="exact_match", image_root=tmp_path)
    task, problems = scan_task(config)
    assert problems == []
    (scored,) = evaluation_sets(config, "validation")
    for found in (task.train, task.validation, scored.load()):
        assert [own.id for own in found] == ["GQA0", "GQA1", "GQA2"]
    _, problems = scan_task(config.model_copy(update={"name": "gqa"}))
    (problem,) = set(problems)
    assert problem.startswith(
        f"{path}: its records name the tasks GQA, VQAv2 in 'task', and none 'gqa'; name the task as"
    )
    nameless = written(tmp_path, [LLAVA[1], *rows, LLAVA[1]], ".jsonl")
    _, (problem,) = read_file(nameless).of_task("GQA", unique_ids=False)
    assert problem.startswith(f"{nameless}, line 1: no 'task', as 2 in all, and others name GQA, VQAv2: no ")
    one = written(tmp_path, [rows[0], LLAVA[1]], ".jsonl")  # a single name says nothing more than the file
    assert len(scan_task(TaskConfig(name="a", train=one, auxiliary=True))[0].train) == 2


def test_a_file_of_several_tasks_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("GQA", "VQAv2", "OCR-VQA")
    asked = [{"from": "human", "value": "?"}, GPT]
    rows = [record(id=f"{task}{n}", task=task, image="", conversations=asked) for n in range(3) for task in names]
    paths = [written(tmp_path, rows, suffix) for suffix in (".json", ".jsonl")]
    (tmp_path / "other").mkdir()
    alone = written(tmp_path / "other", rows[:1], ".json")
    configs = [TaskConfig(name=name, train=paths[0], validation=paths[1], metric="exact_match") for name in names]
    configs.append(TaskConfig(name="chat", train=alone, auxiliary=True))
    expected = [load_task(config) for config in configs]
    read: list[Path] = []
    monkeypatch.setattr("trainer.tasks.read_file", lambda path: read.append(path) or read_file(path))
    assert list(load_tasks(configs)) == expected
    assert [own.id for own in expected[1].train] == ["VQAv20", "VQAv21", "VQAv22"]
    config = RunConfig(output_dir=tmp_path / "run", tasks=configs)
    assert [checked.task for checked in check_all(config, None)] == expected
    assert planned_data(config, configs).validation == dict.fromkeys(names, 3)
    assert read == [*paths, alone] * 3


def test_a_list_takes_no_more_memory_than_lines(tmp_path: Path) -> None:
    """Every rank reads all files; a list as one JSON value takes several times its size."""
    text = {"from": "gpt", "value": "This. " * 500}
    rows = [record(id=f"r{number}", conversations=[HUMAN, text]) for number in range(2000)]
    paths = [written(tmp_path, rows, suffix) for suffix in (".jsonl", ".json")]
    peaks = []
    for path in paths:
        tracemalloc.start()
        found = read_records(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(found) == len(rows)
        del found
    assert peaks[1] < peaks[0] + 3 * 2**20  # windows of 2^18 characters; the file has 6 MB, its value another 6


def test_no_cycles_are_looked_for_while_reading(tmp_path: Path) -> None:
    """Of the objects of 3000 records, were they kept, Python would look some twenty times."""
    path = written(tmp_path, [record() for _ in range(3000)], ".json")
    seen: list[str] = []

    def note(phase: str, _: Any) -> None:
        seen.append(phase)

    gc.callbacks.append(note)
    try:
        read_file(path)
    finally:
        gc.callbacks.remove(note)
    assert len(seen) <= 10  # before and behind


def test_records_take_little_more_memory_than_their_text(tmp_path: Path) -> None:
    """Every rank and every process that encodes for it has them; as objects these would take six times the text."""
    turn = [{"from": "human", "value": "Is it red? " * 3}, {"from": "gpt", "value": "Yes. It is red."}]
    path = written(
        tmp_path, [record(id=f"{n:08}", conversations=[HUMAN, GPT, *turn * 4]) for n in range(1000)], ".jsonl"
    )
    read_records(path)  # what is made once
    tracemalloc.start()
    found = read_records(path)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    text = sum(len(own.id) + sum(len(turn.question) + len(turn.answer) for turn in own.turns) for own in found)
    assert size < 1.5 * text


def test_records_are_a_sequence(tmp_path: Path) -> None:
    expected = [
        Record(str(n), ("a.png",) * n, (Turn("é" * 300, ""), Turn("", "\0")), ("x", "y"), "s") for n in range(4)
    ]
    found = Records(iter(expected))
    assert found == expected != Records(expected[:3])
    assert [found[place] for place in (0, -1, 2)] == [expected[place] for place in (0, -1, 2)]
    assert found[1:] == expected[1:]
    assert found[::-2] == expected[::-2]
    assert (len(found), expected[2] in found, found.index(expected[3])) == (4, True, 3)
    for place in (4, -5):
        with pytest.raises(IndexError):
            found[place]


def test_a_task_of_some_splits_reads_no_other(tmp_path: Path) -> None:
    path = written(tmp_path, LLAVA, ".json")
    none = tmp_path / "none.json"
    config = TaskConfig(name="a", train=path, validation=none, test=none, metric="cider", image_root=tmp_path)
    task = load_task(config, ("train",))
    assert (len(task.train), len(task.validation), task.test) == (3, 0, [])
    with pytest.raises(UserError, match="does not exist"):
        load_task(config)


def test_written_records_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    write_jsonl(path, LLAVA)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == LLAVA
    assert [found.id for found in read_records(path)] == ["000000033471", "wgByO4Y_0", "1053"]
    assert [found.name for found in path.parent.iterdir()] == ["records.jsonl"]
