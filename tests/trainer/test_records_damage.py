"""Damaged records: each is named by file, position and id, and nothing but a `RecordError` is raised."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_files import GPT, HUMAN, LLAVA, record, written

from trainer.data.checking import check_files
from trainer.data.records import RecordError, read_records
from trainer.errors import UserError

DAMAGED = [
    ([1], "expected an object, got list"),
    ("text", "expected an object, got str"),
    (record(id="absent"), "the record has no 'id'"),
    ({"instruction": "a", "output": "b"}, "the record has no 'id'; `cotbal convert messages` makes records, "),
    (record(id=None), "'id' must be a string or a number, got None"),
    (record(id={}), "'id' must be a string or a number, got {}"),
    (record(image=3), "'image' must be a path or a list of paths, got 3"),
    (record(image=0), "'image' must be a path or a list of paths, got 0"),
    (record(image=["a.png", 3]), "'image' must be a path or a list of paths"),
    (record(image="a\0.png"), "'image' must be a path or a list of paths"),
    (record(image="absent", images=[3]), "'images' must be a path or a list of paths, got [3]"),
    (record(images=["b.png"]), "it has 'image' and 'images'; keep one of them"),
    (record(image="absent", image_path="a.png"), "'image_path' is not read; did you mean 'image'?"),
    (record(image="absent", img=["a.png"]), "'img' is not read; did you mean 'image'?"),
    (record(system="Be brief."), "'system' is not read; a system message is a first turn {'from': 'system', "),
    (record(tools=[{"name": "f"}]), "'tools' is not read; descriptions of tools go into the system message"),
    (record(conversations="absent", messages=[HUMAN, GPT]), "'messages' is not read; `cotbal convert messages` ma"),
    (record(video="a.mp4"), "'video' is not read; videos are not supported"),
    (record(image=["a.png", "b.png"]), "1 '<image>' in the text but 2 image(s)"),
    (record(image="absent"), "1 '<image>' in the text but 0 image(s); where it is text, give the record 'images': []"),
    (record(conversations="absent"), "'conversations' must be a list with at least one human and one gpt turn"),
    (record(conversations=[]), "'conversations' must be a list with at least one human and one gpt turn"),
    (record(conversations=[HUMAN]), "'conversations' must be a list with at least one human and one gpt turn"),
    (record(conversations=[HUMAN, GPT, HUMAN]), "the last turn must be a gpt answer"),
    (record(conversations=[HUMAN, HUMAN]), "turns must alternate human, gpt; turn 1 is 'human'"),
    (record(conversations=[GPT, HUMAN]), "turns must alternate human, gpt; turn 0 is 'gpt'"),
    (record(conversations=[HUMAN, {"from": "system", "value": "x"}]), "turn 1 must be {'from': 'human'|'gpt'"),
    (
        record(conversations=[{"from": "system", "value": 3}, HUMAN, GPT]),
        "turn 0 is a system message: its 'value' ",
    ),
    (record(conversations=[{"from": "system", "value": "<image>"}, HUMAN, GPT]), "turn 0 is a system message: its "),
    (
        record(conversations=[{"from": "system", "value": "x"}, GPT, HUMAN]),
        "turns must alternate human, gpt; turn 1 ",
    ),
    (record(conversations=[{"from": "system", "value": "x"}, HUMAN]), "'conversations' must be a list with at least"),
    (record(conversations=[HUMAN, {"from": "gpt", "value": 7}]), "turn 1 must be {'from': 'human'|'gpt'"),
    (record(conversations=[HUMAN, "This."]), "turn 1 must be {'from': 'human'|'gpt'"),
    (record(conversations=[HUMAN, {"from": "gpt", "value": ""}]), "no supervised token: every gpt turn is empty"),
    (record(conversations=[HUMAN, {"from": "gpt", "value": " \n"}]), "no supervised token: every gpt turn is empty"),
    (record(conversations=[HUMAN, {"from": "gpt", "value": ""}] * 2, image=["a", "b"]), "no supervised token: every"),
    (record(conversations=[HUMAN, {"from": "gpt", "value": "see <image>"}]), "turn 1 is an answer with '<image>'"),
    (record(image=[]), "1 '<image>' in the text but 0 image(s); where it is text, give the record 'images': []"),
    (
        record(conversations=[HUMAN, {"from": "gpt", "value": "see <image>"}], images=[]),
        "turn 1 is an answer with '<image>' in it; images belong to questions, and where it is text in a record with",
    ),
    (record(conversations=[HUMAN, {"from": "gpt", "value": "\ud800"}]), "its text is not valid Unicode"),
    (record(references="x"), "'references' must be a list of strings"),
    (record(references=[1]), "'references' must be a list of strings"),
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(("row", "message"), DAMAGED)
def test_damage_names_file_position_and_id(tmp_path: Path, row: Any, message: str, suffix: str) -> None:
    path = written(tmp_path, [LLAVA[0], row], suffix)
    with pytest.raises(RecordError) as caught:
        read_records(path)
    position = "line 2" if suffix == ".jsonl" else "record 1"
    named = " (id 'r7')" if isinstance(row, dict) and row.get("id") == "r7" else ""
    assert str(caught.value).startswith(f"{path}, {position}{named}: {message}")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_every_damaged_record_is_named(tmp_path: Path, suffix: str) -> None:
    """Up to ten of a file; good ones among them hide nothing, nor does a line that is not JSON."""
    damaged = [(row, text) for row, text in DAMAGED if not isinstance(row, dict) or row.get("id") == "r7"]
    for count in (4, 10, len(damaged)):
        rows = [item for row, _ in damaged[:count] for item in (row, record(id=f"good {count}"))][:-1]
        rows = [row | {"id": f"{row['id']} {n}"} if isinstance(row, dict) else row for n, row in enumerate(rows)]
        path = written(tmp_path, rows, suffix)
        if suffix == ".jsonl":
            path.write_text(path.read_text() + '{"id": \n')
        with pytest.raises(RecordError) as caught:
            read_records(path)
        told = str(caught.value).splitlines()
        wanted = [text for _, text in damaged[:count]] + ["not valid JSON"] * (suffix == ".jsonl")
        assert len(told) == min(len(wanted), 11)
        for number, (line, text) in enumerate(zip(told[:10], wanted, strict=False)):
            place = f"line {2 * number + 1}" if suffix == ".jsonl" else f"record {2 * number}"
            assert line.startswith(f"{path}, {place}" if text != "not valid JSON" else f"{path}, line ")
            assert text in line
        assert told[10:] == ([f"... and {len(wanted) - 10} more like these"] if len(wanted) > 10 else [])


@pytest.mark.parametrize(("first", "again"), [("r7", "r7"), (7, "7")])
def test_duplicate_ids_name_both_places(tmp_path: Path, first: Any, again: Any) -> None:
    path = written(tmp_path, [record(id=first), LLAVA[1], record(id=again)], ".jsonl")
    with pytest.raises(RecordError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}, line 3: id '{again}' is already used by {path}, line 1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"id": 1', ", line 1: not valid JSON"),
        ("a.jsonl", b"\xff\xfe", ", line 1: not valid JSON"),
        ("a.jsonl", b"1" * 5000, ", line 1: not valid JSON"),  # Python refuses to read such a number
        ("a.jsonl", b"[" * 100_000, ", line 1: not valid JSON"),  # and such a nesting
        (
            "a.json",
            b"[" * 100_000,
            ": not a JSON list of records (JSON Lines are .jsonl): at byte 1, not a usable JSON value",
        ),
        ("a.json", b"", ": not a JSON list of records (JSON Lines are .jsonl): at byte 0, the file ends"),
        (
            "a.json",
            b"\xff\xfe",
            ": not a JSON list of records (JSON Lines are .jsonl): at byte 0, the text is not valid UTF-8",
        ),
        (
            "a.json",
            b'{"id": 1}',
            ": not a JSON list of records (JSON Lines are .jsonl): at byte 0, expected [, found '{'",
        ),
        ("a.json", b"null", ": not a JSON list of records (JSON Lines are .jsonl): at byte 0, expected [, found 'n'"),
        ("a.json", b"[] 1", ": not a JSON list of records (JSON Lines are .jsonl): at byte 3, text after the end"),
    ],
)
def test_files_that_are_not_records(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError) as caught:
        read_records(tmp_path / name)
    assert f"{tmp_path / name}{message}" in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(RecordError, match=rf"record file {path} does not exist"):
            read_records(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_pointer_to_a_file(tmp_path: Path, name: str) -> None:
    """What a clone without Git LFS has of a data set."""
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
    message = f"^{path}: only Git LFS's pointer is there, not the file"
    with pytest.raises(RecordError, match=message):
        read_records(path)
    with pytest.raises(UserError, match=message):
        check_files([path])


# Half a character, a NUL and characters of one to four bytes.
strings = st.text("ab \0\n\ud800é„\U0001f44b", max_size=4) | st.sampled_from(
    ["<image>", "human", "gpt", "system", "value", "from"]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=4,
)


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, item in inside for place in places(item, (*here, key)))]


def check(path: Path) -> None:
    """A RecordError that names the file, or records that keep every promise; never another exception."""
    try:
        records = read_records(path)
    except RecordError as error:
        if str(path) not in str(error):
            pytest.fail(f"'{error}' does not name the file")
        return
    for found in records:
        assert found.turns
        assert any(turn.answer.strip() for turn in found.turns)
        assert sum(turn.question.count("<image>") for turn in found.turns) == len(found.images)
        held = [found.id, found.system, *found.images, *found.answers, *(turn.question for turn in found.turns)]
        assert all(isinstance(text, str) and text.encode().decode() == text for text in held)


@given(st.data())
def test_arbitrary_damage_to_a_value(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    rows: Any = copy.deepcopy(LLAVA)
    place = data.draw(st.sampled_from(places(rows)[1:]))
    holder = rows
    for key in place[:-1]:
        holder = holder[key]
    if data.draw(st.booleans()):
        holder[place[-1]] = data.draw(json_values)
    else:
        del holder[place[-1]]
    check(written(tmp_path_factory.getbasetemp(), rows, data.draw(st.sampled_from([".json", ".jsonl"]))))


@given(st.data())
def test_arbitrary_damage_to_the_bytes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = written(tmp_path_factory.getbasetemp(), LLAVA, data.draw(st.sampled_from([".json", ".jsonl"])))
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, min(len(content), start + 20)))
    path.write_bytes(content[:start] + data.draw(st.binary(max_size=6)) + content[stop:])
    check(path)
