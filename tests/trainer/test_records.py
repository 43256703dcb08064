"""Reading records: what is right loads unchanged, what is wrong is named by file, position and id."""

from __future__ import annotations

import codecs
import copy
import gc
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.records import Record, RecordError, Records, Turn, read_records, scan_records, write_jsonl
from trainer.errors import UserError
from trainer.pipeline.evaluations import evaluation_sets
from trainer.task_config import TaskConfig
from trainer.tasks import load_task, scan_task

HUMAN, GPT = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}
# As in llava_v1_5_mix665k.json (Liu et al. 2023): extra keys, image-less chats, integer ids, several turns.
LLAVA: list[dict[str, Any]] = [
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
            {"from": "gpt", "value": "The bus in the image is white and red."},
            {"from": "human", "value": "What feature can be seen on the back of the bus?"},
            {"from": "gpt", "value": "The back of the bus features an advertisement."},
        ],
    },
    {
        "id": "wgByO4Y_0",
        "model": "",
        "conversations": [
            {"from": "human", "value": "How do I grüßen? \U0001f44b"},
            {"from": "gpt", "value": "Sag „Hallo“."},
        ],
    },
    {
        "id": 1053,
        "image": "ocr_vqa/images/1053.jpg",
        "conversations": [
            {"from": "human", "value": "Who wrote this book?\n<image>"},
            {"from": "gpt", "value": "Someone"},
        ],
    },
]


def written(folder: Path, rows: list[Any], suffix: str) -> Path:
    path = folder / f"records{suffix}"
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n" if suffix == ".jsonl" else f"[{','.join(lines)}]")
    return path


def record(**changes: Any) -> dict[str, Any]:
    row = {"id": "r7", "image": "a.png", "conversations": [HUMAN, GPT], **changes}
    return {key: value for key, value in row.items() if value != "absent"}


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


def test_one_empty_gpt_turn_among_others_is_fine(tmp_path: Path) -> None:
    rows = [record(conversations=[HUMAN, {"from": "gpt", "value": ""}, {"from": "human", "value": "And?"}, GPT])]
    assert [turn.answer for turn in read_records(written(tmp_path, rows, ".json"))[0].turns] == ["", "This."]


@pytest.mark.parametrize(("first", "again"), [("r7", "r7"), (7, "7")])
def test_duplicate_ids_name_both_places(tmp_path: Path, first: Any, again: Any) -> None:
    path = written(tmp_path, [record(id=first), LLAVA[1], record(id=again)], ".jsonl")
    with pytest.raises(RecordError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}, line 3: id '{again}' is already used by {path}, line 1")


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
    (problem,) = scan_records(nameless, unique_ids=False, task="GQA")[1]
    assert problem.startswith(f"{nameless}, line 1: no 'task', as 2 in all, and others name GQA, VQAv2: no ")
    one = written(tmp_path, [rows[0], LLAVA[1]], ".jsonl")  # a single name says nothing more than the file
    assert len(scan_task(TaskConfig(name="a", train=one, auxiliary=True))[0].train) == 2


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
        scan_records(path, unique_ids=False)
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


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(RecordError, match=rf"record file {path} does not exist"):
            read_records(path)


def test_written_records_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    write_jsonl(path, LLAVA)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == LLAVA
    assert [found.id for found in read_records(path)] == ["000000033471", "wgByO4Y_0", "1053"]
    assert [found.name for found in path.parent.iterdir()] == ["records.jsonl"]


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
