"""Parquet as data sets are on the Hub becomes the records that the same rows in JSON Lines become."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from raw_data import convert_raw, png, rows

from trainer.data.converters.conversion import Manifest, convert
from trainer.data.raw_json import Damage
from trainer.errors import UserError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as the library `datasets` stores images
TEXT = pa.string()


def picture(number: int) -> dict[str, Any]:
    return {"bytes": base64.b64decode(png(number)), "path": None}


# The Cauldron and FineVision: a list of images, pairs of texts.
CAULDRON = pa.schema([
    ("images", pa.list_(IMAGE)),
    ("texts", pa.list_(pa.struct([("user", TEXT), ("assistant", TEXT), ("source", TEXT)]))),
])  # fmt: skip
CAULDRON_ROWS = [
    {
        "images": [picture(number), picture(number + 1)],
        "texts": [{"user": f"{number}?", "assistant": "This."}, {"user": "Sure?", "assistant": "Yes."}],
    }
    for number in range(150)  # more than two batches of rows
]
# LLaVA-OneVision's data: LLaVA's conversations, one image, which texts do not have.
ONE_VISION = pa.schema([
    ("id", TEXT), ("image", IMAGE), ("conversations", pa.list_(pa.struct([("from", TEXT), ("value", TEXT)]))),
    ("data_source", TEXT),
])  # fmt: skip
ONE_VISION_ROWS = [
    {
        "id": "a", "image": picture(3), "data_source": "x",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A chart."}],
    },
    {
        "id": "b", "image": None, "data_source": "y",
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
    },
]  # fmt: skip
# TRL's vision data: parts of one schema, each with a null where another kind has its value.
PARTS = pa.schema([
    ("messages", pa.list_(pa.struct([
        ("role", TEXT), ("content", pa.list_(pa.struct([("index", pa.int64()), ("text", TEXT), ("type", TEXT)]))),
    ]))),
    ("images", pa.list_(IMAGE)),
])  # fmt: skip


def part(text: str | None, index: int | None = None) -> dict[str, Any]:
    return {"type": "text" if index is None else "image", "text": text, "index": index}


PARTS_ROWS = [
    {
        "images": [picture(5), picture(6)],
        "messages": [
            {"role": "user", "content": [part(None, 0), part("And "), part(None, 1), part("?")]},
            {"role": "assistant", "content": [part("No.")]},
        ],
    },
    {
        "images": [],
        "messages": [{"role": "user", "content": [part("a")]}, {"role": "assistant", "content": [part("b")]}],
    },
]


def converted(tmp_path: Path, schema: pa.Schema, table: list[dict[str, Any]], **options: Any) -> Manifest:
    (tmp_path / "raw").mkdir(parents=True)
    path = tmp_path / "raw" / "train-00000-of-00001.parquet"
    parquet.write_table(pa.Table.from_pylist(table, schema), path, row_group_size=70)
    return convert("messages", tmp_path / "raw", tmp_path / "out", options)


@pytest.mark.parametrize(
    ("schema", "table"), [(CAULDRON, CAULDRON_ROWS), (ONE_VISION, ONE_VISION_ROWS), (PARTS, PARTS_ROWS)]
)
def test_rows_are_what_they_are_in_json(tmp_path: Path, schema: pa.Schema, table: list[dict[str, Any]]) -> None:
    """With the images in base64 there; without, and without ids of their own, both name records by their place."""
    manifest = converted(tmp_path / "a", schema, table)
    text = json.dumps(table, default=lambda data: base64.b64encode(data).decode())
    other = convert_raw(tmp_path / "b", "messages", {"train-00000-of-00001.jsonl": json.loads(text)})
    found = rows(manifest, "train")
    assert sorted(found, key=str) == sorted(rows(other, "train"), key=str)
    assert (len(found), rows(manifest, "rejected")) == (len(table), [])
    wanted = [image for row in table for image in (row["images"] if "images" in row else [row["image"]]) if image]
    stored = {hashlib.sha256(image["bytes"]).hexdigest(): image["bytes"] for image in wanted}
    there = {path.stem: path.read_bytes() for path in (tmp_path / "a" / "out" / "images").rglob("*.png")}
    assert there == stored


def test_what_a_row_has_no_place_for_is_rejected_by_its_number(tmp_path: Path) -> None:
    swapped = json.loads(json.dumps(PARTS_ROWS[1]))
    swapped["messages"][0]["content"] = [part("?"), part(None, 1), part(None, 0)]
    swapped["images"] = [picture(1), picture(2)]
    broken = {"images": [{"bytes": b"no image", "path": None}], "messages": PARTS_ROWS[1]["messages"]}
    manifest = converted(tmp_path, PARTS, [PARTS_ROWS[0], swapped, broken])
    assert [(row["position"], row["kind"]) for row in rows(manifest, "rejected")] == [
        ("row 2", "not read"), ("row 3", "unreadable image"),
    ]  # fmt: skip
    assert rows(manifest, "rejected")[0]["reason"] == "turn 0: an image is number 1 of the list, out of order"


@pytest.mark.parametrize(
    ("damage", "good"),
    [
        (lambda content: content[:-5], 0),
        (lambda content: b"", 0),
        (lambda content: b"PAR1" + bytes(60) + b"PAR1", 0),
        # The second row group's images, behind its first pages.
        (lambda content: content[: len(content) // 2] + bytes(400) + content[len(content) // 2 + 400 :], 64),
    ],
)
def test_a_damaged_file_ends_there_and_says_so(tmp_path: Path, damage: Any, good: int) -> None:
    """What came before is kept, and the conversion is not complete."""
    path = tmp_path / "raw" / "a.parquet"
    path.parent.mkdir()
    parquet.write_table(pa.Table.from_pylist(CAULDRON_ROWS, CAULDRON), path, row_group_size=64, compression="snappy")
    path.write_bytes(damage(path.read_bytes()))
    manifest = convert("messages", path, tmp_path / "out")
    assert not manifest.complete
    (row,) = rows(manifest, "rejected")
    assert (row["kind"], row["position"]) == ("damaged", f"row {good + 1}")
    assert "is not valid Parquet: " in row["reason"]
    assert [record["id"] for record in (rows(manifest, "train") if good else [])] == [f"a-{i + 1}" for i in range(good)]


def test_which_files_of_a_checkout_are_read(tmp_path: Path) -> None:
    """Those of tables, their splits by name; not what the library `datasets` says about them, and no pointers."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        parquet.write_table(pa.Table.from_pylist(CAULDRON_ROWS[:2], CAULDRON), raw / f"{name}.parquet")
    (raw / "dataset_infos.json").write_text('{"default": {"description": ""}}')
    manifest = convert("messages", raw, tmp_path / "out")
    # The same rows in two files of one split repeat no record: images and words are alike, places are not.
    assert {split: len(rows(manifest, split)) for split in manifest.outputs} == {"train": 4, "validation": 2}
    assert rows(manifest, "rejected") == []
    (raw / "train-00001-of-00002.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(UserError, match=r"train-00001-of-00002\.parquet: only Git LFS's pointer is there"):
        convert("messages", raw, tmp_path / "other")
    with pytest.raises(UserError, match=r"train-00000-of-00002\.parquet is Parquet, which 'messages' reads, and not"):
        convert("m3it", raw, tmp_path / "other")


def test_a_text_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ONE_VISION_ROWS * 50, ONE_VISION)
    texts = [b"\xff\xfe" if number == 70 else b"%d" % number for number in range(100)]  # in the second batch of rows
    path = tmp_path / "a.parquet"
    parquet.write_table(table.set_column(0, "id", pa.array(texts).view(pa.string())), path)
    manifest = convert("messages", path, tmp_path / "out")
    assert manifest.complete
    (row,) = rows(manifest, "rejected")
    assert (row["kind"], row["position"]) == ("damaged", "row 71")
    assert row["reason"].startswith("column 'id' has no readable value: 'utf-8' codec can't decode byte 0xff")
    assert {record["id"] for record in rows(manifest, "train")} == {f"{number}" for number in range(100)} - {"70"}


def test_damage_is_no_exception(tmp_path: Path) -> None:
    from trainer.data.converters.parquet import table_rows

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"a": pa.array([], pa.int64())}), path)
    assert list(table_rows(path)) == []
    texts = pa.array([b"a", b"\xff", b"c"]).view(pa.string())  # of which one is not UTF-8
    nested = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), texts)
    days = pa.array([0, 0, 2**31 - 1], pa.int32()).view(pa.date32())  # of which one is beyond Python's
    parquet.write_table(pa.table({"n": [1, 2, 3], "nested": nested, "day": days}), path)
    first, *others = [element.value for element in table_rows(path)]
    assert first == {"n": 1, "nested": ["a"], "day": date(1970, 1, 1)}
    assert [(damage.reason.partition(":")[0], damage.ends) for damage in others] == [
        ("column 'nested' has no readable value", False), ("column 'day' has no readable value", False),
    ]  # fmt: skip
    assert "can't decode byte 0xff" in others[0].reason
    parquet.write_table(pa.table({"a": [1, 2, 3, 4]}), path)
    size = path.stat().st_size
    assert [element.offset for element in table_rows(path)] == [size // 4, size // 2, size * 3 // 4, size]
    path.write_bytes(path.read_bytes()[:-1])
    (element,) = table_rows(path)
    assert isinstance(element.value, Damage)
    assert element.value.ends
