"""Fields of raw records: what is taken, what is refused, and under which kind it is counted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from trainer.data.converters.base import Rejected
from trainer.data.converters.fields import (
    as_object,
    files_below,
    find_file,
    get_id,
    get_list,
    get_number,
    get_text,
    image_path,
    shown,
    split_of,
)
from trainer.errors import UserError

OUTSIDE = "outside the image root"
FIELDS: list[tuple[Callable[..., Any], Any, Any]] = [
    (get_text, " a b\n", "a b"),
    (get_text, 3, "3"),
    (get_text, -0.5, "-0.5"),
    (partial(get_text, empty=True), " \n", ""),
    (get_id, "x 1", "x 1"),
    (get_id, 0, "0"),
    (get_number, 0, 0),
    (get_number, 2**53 - 1, 2**53 - 1),
    (get_list, [], []),
]
REFUSED: list[tuple[Callable[..., Any], list[Any], str]] = [
    (get_text, [True, float("nan"), float("inf"), None, ["a"]], "malformed"),
    (get_text, ["", " \n"], "empty text"),
    (get_id, ["", True, 1.5, None, ["a"]], "malformed"),
    (get_number, [-1, 2**53, True, 1.0, "1", None], "malformed"),
    (get_list, [(), "a", {}, None], "malformed"),
]


@pytest.mark.parametrize(("get", "value", "wanted"), FIELDS)
def test_taken(get: Callable[..., Any], value: Any, wanted: Any) -> None:
    assert get({"key": value}, "key") == wanted


@pytest.mark.parametrize(("get", "values", "kind"), REFUSED)
def test_refused(get: Callable[..., Any], values: list[Any], kind: str) -> None:
    for value in values:
        with pytest.raises(Rejected, match="'key'") as caught:
            get({"key": value}, "key")
        assert caught.value.kind == kind


def test_objects() -> None:
    assert as_object({"a": 1}) == {"a": 1}
    with pytest.raises(Rejected, match="expected an object, got list"):
        as_object([])


@pytest.mark.parametrize(
    ("value", "text"),
    [("a", "'a'"), ("x" * 78, repr("x" * 78)), ("x" * 79, "'" + "x" * 76 + "..."), ([1], "list"), ({}, "dict")],
)
def test_values_are_shown_in_part(value: Any, text: str) -> None:
    assert shown(value) == text
    assert len(text) <= 80


def test_image_paths() -> None:
    good = {("", "a.jpg"): "a.jpg", ("x/y/", "b/a..jpg"): "x/y/b/a..jpg", ("x", "..a"): "x/..a"}
    assert {pair: image_path(*pair) for pair in good} == good
    for folder, name in [("", "/a"), ("/x", "a"), ("x", "../a"), ("", "a/../b"), ("x", " "), ("", ""), ("", "a\0"),
                         ("", "a\\b")]:  # fmt: skip
        with pytest.raises(Rejected) as caught:
            image_path(folder, name)
        assert caught.value.kind == OUTSIDE


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.jsonl", "train"), ("qa/val.json", "validation"), ("dev/te.jsonl", "validation"),
        ("test/train/a.json", "train"), ("train_test.json", "test"), ("a-Valid.v2.json", "validation"),
        ("latest/trains.json", "train"), ("a.test", "train"), ("validation/data.json", "validation"),
        ("training/x.json", "train"),
    ],
)  # fmt: skip
def test_the_split_that_a_path_speaks_of(path: str, split: str) -> None:
    """The last word that is one, of the names below the folder, without the suffix."""
    base = Path("/raw/test")
    assert split_of(base / path, base) == split


def test_files(tmp_path: Path) -> None:
    for name in ("b.json", "a/c.json", "a/d.jsonl", "a/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.json").mkdir()
    assert files_below(tmp_path, (".json",), "x") == [tmp_path / "a/c.json", tmp_path / "b.json"]
    assert files_below(tmp_path / "a/e.txt", (".json",), "x") == [tmp_path / "a/e.txt"]
    assert find_file(tmp_path, ["none", "b.json", "a/c.json"], "x") == tmp_path / "b.json"
    with pytest.raises(UserError, match=r"has no thing \(\.csv, \.tsv\)$"):
        files_below(tmp_path, (".tsv", ".csv"), "thing")
    with pytest.raises(UserError, match="has no thing: expected x or y"):
        find_file(tmp_path, ["x", "y"], "thing")
    (tmp_path / "table.parquet").touch()
    for source in (tmp_path, tmp_path / "table.parquet"):
        with pytest.raises(UserError, match=r"parquet is Parquet, which 'messages' reads, and not thing \(\.tsv\)"):
            files_below(source, (".tsv",), "thing")
    assert files_below(tmp_path, (".json", ".parquet"), "x")[-1] == tmp_path / "table.parquet"
    assert files_below(tmp_path, (".jsonl",), "x") == [tmp_path / "a/d.jsonl"]
