"""Several test sets of a task in a configuration and on the command line, and errors that name the set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from damage import longer
from several_sets import rows_of, with_test_sets

from trainer.config import load_config, parse_config
from trainer.data.records import write_jsonl
from trainer.errors import UserError
from trainer.nodes.following import _missing_files
from trainer.nodes.machine import record_sizes
from trainer.pipeline.planned_data import planned_data
from trainer.pipeline.preflight import check_config


@pytest.fixture
def data(run_data: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return with_test_sets(run_data, tmp_path)


def more_turns(row: dict[str, Any]) -> None:
    row["conversations"] += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "No."}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(image="no.png"), "task 'colour', test set 'testB', record 'colour-train-4': image "),
        (more_turns, "task 'colour', test set 'testB', record 'colour-train-4': scoring takes one question per record"),
        (longer, "task 'colour', test set 'testB' {path}: record 'colour-train-4': its images and the text around"),
        (None, "task 'colour': the test set 'testB' {path} has no records"),
    ],
)
def test_errors_name_the_set(
    data: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any]], None] | None, message: str
) -> None:
    path = tmp_path / "b.jsonl"
    rows = rows_of(path) if change else []
    if change:
        change(rows[1])
    write_jsonl(path, rows)
    data["tasks"][0]["test_metrics"] = ["bleu" if change is more_turns else "perplexity"]  # of prompts or of answers
    config = parse_config(data, "x")
    with pytest.raises(UserError) as caught:
        check_config(config)
    assert message.format(path=path) in str(caught.value)
    if change is None or change.__name__ != "<lambda>":  # the plan opens no image
        assert not isinstance(config.tasks, str)
        with pytest.raises(UserError) as caught:
            planned_data(config, config.tasks)
        assert message.format(path=path) in str(caught.value)


def test_other_machines_look_for_every_set(data: dict[str, Any], tmp_path: Path) -> None:
    config = parse_config(data, "x")
    assert _missing_files(config, record_sizes(config)) == []
    (tmp_path / "b.jsonl").unlink()
    assert _missing_files(config, record_sizes(config)) == [f"{tmp_path / 'b.jsonl'} does not exist there"]


class TestCommand:
    def test_one_of_the_sets(
        self, cotbal: Callable[..., Any], data: dict[str, Any], write_config: Callable[..., Path], pixel_model: Path,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        options = ("--config", write_config(data), "--task", "colour", "--output", tmp_path / "out", "--quiet")
        outcome = cotbal("evaluate", pixel_model, *options, "--test-set", "testB", "--max-new-tokens", 2)
        assert outcome.code == 0, outcome.err
        found = json.loads(outcome.out)["metrics"]
        assert {name: score["samples"] for name, score in found.items()} == {"span_f1": 3, "exact_match": 3}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--task", "colour"), "task 'colour' has several test sets; name one with --test-set: testA+, testB"),
            (
                ("--task", "colour", "--test-set", "testA"),
                "unknown test set 'testA' (did you mean 'testA+'?); valid: testA+, testB",
            ),
            (("--task", "chat", "--test-set", "x"), "task 'chat' has one test file, without a name; leave out --test-"),
            (
                ("--task", "box", "--split", "validation", "--test-set", "far"),
                "needs --config, --task and --split test",
            ),
        ],
    )
    def test_errors(
        self, cotbal: Callable[..., Any], data: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path,
        options: tuple[str, ...], message: str,
    ) -> None:  # fmt: skip
        outcome = cotbal("evaluate", tmp_path, "--config", write_config(data), "--output", tmp_path / "out", *options)
        assert (outcome.code, outcome.out) == (2, "")
        assert message in outcome.err


class TestConfiguration:
    @pytest.mark.parametrize(
        ("task", "message"),
        [
            (
                {"test": 5},
                "test: must be a file of records, or files by name: {testA: a.jsonl, testB: b.jsonl} (got 5)",
            ),
            ({"test": {}}, "test: must be a file of records, or files by name"),
            ({"test": ["a.jsonl"]}, "test: must be a file of records, or files by name"),
            ({"test": {"a/b": "t"}}, "test: test set name 'a/b' must be letters, digits, '_', '-', '.', '+' only"),
            ({"test": {"a": None}}, "test: test set 'a' must be a file of records, got None"),
            ({"test_metrics": ["cidr"]}, "test_metrics: unknown metric 'cidr' (did you mean 'cider'?)"),
            ({"test_metrics": ["bleu", "cider", "bleu"]}, "test_metrics: given twice: bleu"),
            ({"test_metrics": ["bleu", "perplexity"]}, "test_metrics: perplexity scores the given answers, the others"),
            ({"test_metrics": ["bleu"], "test": None}, "test_metrics: there is no 'test' to score with them"),
        ],
    )
    def test_errors(self, task: dict[str, Any], message: str) -> None:
        whole = {"name": "a", "train": "a", "validation": "v", "test": "t", "metric": "cider", **task}
        with pytest.raises(UserError) as caught:
            parse_config({"output_dir": "o", "tasks": [whole]}, "x")
        (line,) = str(caught.value).splitlines()[1:]
        assert line.strip().startswith(f"tasks.0.{message}")

    def test_paths_of_sets(
        self, data: dict[str, Any], write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("RECORDS", "/records")
        data["tasks"][0]["test"] = {"testA+": "${RECORDS}/a.jsonl", 2017: "b.jsonl"}
        path = write_config(data)
        config = load_config(path)
        assert not isinstance(config.tasks, str)
        assert config.tasks[0].test == {"testA+": Path("/records/a.jsonl"), "2017": tmp_path / "b.jsonl"}
        path.write_text(config.to_yaml())
        assert load_config(path) == config
        assert yaml.safe_load(config.to_yaml())["tasks"][2]["test"] == data["tasks"][2]["test"]
        monkeypatch.delenv("RECORDS")
        with pytest.raises(UserError, match=r"tasks\.0\.test\.testA\+ needs the environment variable RECORDS"):
            load_config(write_config(data))
