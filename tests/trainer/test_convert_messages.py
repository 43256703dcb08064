"""Chats of other trainers, each as the trainer's own documentation writes it, become records word for word."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from raw_data import convert_raw, png, rows, values

from trainer.data.converters.conversion import convert
from trainer.data.records import read_records


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def text(own: str) -> dict[str, str]:
    return {"type": "text", "text": own}


ASK, ANSWER = said("user", "How much is 2 + 1?"), said("assistant", "  3\n")
PICTURE = {"type": "image"}
DATA = f"data:image/png;base64,{png(1)}"
STORED = f"images/{(digest := hashlib.sha256(base64.b64decode(png(1))).hexdigest())[:2]}/{digest}.png"


def converted(tmp_path: Path, *chats: Any, **options: Any) -> list[dict[str, Any]]:
    """The records, none of which is rejected, as rows of the file."""
    manifest = convert_raw(tmp_path, "messages", {"a.jsonl": list(chats)}, **options)
    assert rows(manifest, "rejected") == []
    read_records(manifest.path.with_name("train.jsonl"))
    return rows(manifest, "train")


@pytest.mark.parametrize(
    ("chat", "images", "wanted"),
    [
        ({"messages": [ASK, ANSWER]}, None, ["How much is 2 + 1?", "  3\n"]),
        # OpenAI: parts, and the paths in them; its fine-tuning takes addresses, local servers paths.
        (
            {"messages": [
                said("user", [text("Which?"), {"type": "image_url", "image_url": {"url": "a/1.png", "detail": "low"}}]),
                said("assistant", [text("Th"), text("is.")], weight=1),
                said("user", "Sure?", name="x", weight=0), said("assistant", "Yes.", tool_calls=None, weight=1.0),
            ]},
            "a/1.png", ["Which?\n<image>", "This.", "Sure?", "Yes."],
        ),
        # TRL: parts without paths, in the order of the list beside them.
        (
            {"images": ["1.png", {"path": "2.png", "bytes": None}], "messages": [
                said("user", [PICTURE, text("Or "), text("this:"), PICTURE, text("?")]), said("assistant", "No."),
            ]},
            ["1.png", "2.png"], ["<image>\nOr this:\n<image>\n?", "No."],
        ),
        # LLaMA-Factory and ms-swift: placeholders in texts; the latter may leave them out.
        (
            {"messages": [said("user", "<image>And <image>?"), said("assistant", "No.")], "images": ["1.png", "2.png"]},
            ["1.png", "2.png"], ["<image>And <image>?", "No."],
        ),
        (
            {"messages": [ASK, ANSWER], "images": [], "image": "1.png"},
            "1.png", ["<image>\nHow much is 2 + 1?", "  3\n"],
        ),
        # Qwen and transformers: a path in the part.
        (
            {"messages": [said("user", [{"type": "image", "image": "file://b.png"}, text("?")]), ANSWER]},
            "b.png", ["<image>\n?", "  3\n"],
        ),
        # LLaMA-Factory's second version: parts of `value`, and weights.
        (
            {"messages": [
                said("user", [{"type": "image_url", "value": "a.png"}, {"type": "text", "value": "?"}], loss_weight=0),
                said("assistant", [{"type": "text", "value": "This."}], loss_weight=1.0),
            ]},
            "a.png", ["<image>\n?", "This."],
        ),
        # Axolotl and LLaMA-Factory also take ShareGPT's spelling, of other models too.
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "chatgpt", "value": "Ho"}], "tools": "[]"},
            None, ["Hi", "Ho"],
        ),
        # OpenAI's page on images, and Azure's, ask in one message and show in the next; an image may be in the address.
        (
            {"messages": [
                said("user", "What is this?"), said("user", [{"type": "image_url", "image_url": {"url": DATA}}]),
                said("assistant", "Danbo"),
            ]},
            STORED, ["What is this?\n<image>", "Danbo"],
        ),
        (
            {"messages": [ASK, ANSWER, said("user", "a"), said("user", "b"), said("user", "c"), ANSWER]},
            None, ["How much is 2 + 1?", "  3\n", "a\nb\nc", "  3\n"],
        ),
        # Alpaca, as published; LLaMA-Factory's fields beside it, whose earlier answers are trained on too.
        ({"instruction": "Sort.", "input": "3 1", "output": " 1 3", "text": "Below is"}, None, ["Sort.\n3 1", " 1 3"]),
        (
            {"instruction": "<image>Sort.", "input": "", "output": "1", "history": [["a", "b"], ["c", "d"]],
             "images": ["1.png"], "system": ""},
            "1.png", ["a", "b", "c", "d", "<image>Sort.", "1"],
        ),
        ({"instruction": " ", "input": "3 1", "output": 13, "history": None}, None, ["3 1", "13"]),
        # Dolly; ms-swift.
        ({"instruction": "When?", "context": "In 1900.", "response": "1900"}, None, ["When?\nIn 1900.", "1900"]),
        ({"query": "c", "response": "d", "history": [["a", "b"]]}, None, ["a", "b", "c", "d"]),
        ({"conversation": [{"human": "a", "assistant": "b"}]}, None, ["a", "b"]),
        # The Cauldron and FineVision, of Parquet with the bytes in base64.
        (
            {"images": [{"bytes": png(1), "path": None}], "texts": [
                {"user": "Which?", "assistant": "This.", "source": "x"}, {"user": "Sure?", "assistant": "Yes."},
            ]},
            STORED, ["<image>\nWhich?", "This.", "Sure?", "Yes."],
        ),
        # TRL's prompts and completions; messages go before them, as in UltraChat.
        ({"prompt": "The sky is", "completion": " blue."}, None, ["The sky is", " blue."]),
        ({"prompt": [ASK], "completion": [ANSWER], "label": True}, None, ["How much is 2 + 1?", "  3\n"]),
        ({"prompt": "How", "messages": [ASK, ANSWER], "conversations": None}, None, ["How much is 2 + 1?", "  3\n"]),
        (
            {"prompt": [said("user", [PICTURE, text("?")])], "completion": [ANSWER, ASK, ANSWER], "image": DATA},
            STORED, ["<image>\n?", "  3\n", "How much is 2 + 1?", "  3\n"],
        ),
    ],
)  # fmt: skip
def test_each_spelling(tmp_path: Path, chat: dict[str, Any], images: Any, wanted: list[str]) -> None:
    (row,) = converted(tmp_path, chat)
    assert (row.get("image"), values(row)) == (images, wanted)
    assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(wanted) // 2)
    assert row["id"] == "a-1"


@pytest.mark.parametrize(
    "chat",
    [
        {"messages": [said("system", "Be brief."), ASK, ANSWER]},
        {"messages": [said("developer", [text(" Be brief.\n")]), ASK, ANSWER]},
        {"messages": [ASK, ANSWER, said("user", "Sure?"), said("assistant", "Yes.")], "system": "Be brief."},
        {"instruction": ASK["content"], "output": ANSWER["content"], "system": "Be brief."},
        {"prompt": [said("system", "Be brief."), ASK], "completion": [ANSWER]},
    ],
)
def test_system_messages(tmp_path: Path, chat: dict[str, Any]) -> None:
    (row,) = converted(tmp_path, chat)
    assert row["conversations"][0] == {"from": "system", "value": "Be brief."}
    others = values(row)[2:]
    assert others in ([ANSWER["content"]], [ANSWER["content"], "Sure?", "Yes."])
    assert values(row)[1] == ASK["content"]
    (row,) = converted(tmp_path, chat, system="prepend")
    assert values(row) == [f"Be brief.\n\n{ASK['content']}", *others]
    (row,) = converted(tmp_path, chat, system="drop")
    assert values(row) == [ASK["content"], *others]


def test_where_no_image_can_be_meant_a_placeholder_is_text(tmp_path: Path) -> None:
    asked = "What is <image> in SVG?"
    chats = [
        {"messages": [said("user", [text(asked)]), ANSWER]},
        {"messages": [said("user", asked), ANSWER], "images": []},
    ]
    for row in converted(tmp_path, *chats):
        assert (row["images"], values(row)[0]) == ([], asked)


def test_splits_are_named_by_files_or_drawn(tmp_path: Path) -> None:
    chats = [{"messages": [said("user", f"{number}?"), ANSWER], "id": number % 8} for number in range(10)]
    manifest = convert_raw(tmp_path / "files", "messages", {"train.json": chats[:6], "b/test_2.jsonl": chats[6:]})
    assert [[row["id"] for row in rows(manifest, split)] for split in ("train", "test")] == [
        ["0#1.1", "1#1.2", "2", "3", "4", "5"], ["6", "7", "0", "1"],
    ]  # fmt: skip
    few = convert_raw(tmp_path / "files", "messages", {}, test=1, validation=2)
    assert {split: len(rows(few, split)) for split in few.outputs} == {"validation": 2, "train": 4, "test": 1}
    alone = convert("messages", tmp_path / "files" / "raw" / "train.json", tmp_path / "alone")
    assert [row["id"] for row in rows(alone, "train")] == ["0", "1", "2", "3", "4", "5"]
    manifest = convert_raw(tmp_path / "one", "messages", {"chats.json": chats}, validation=3)
    assert [len(rows(manifest, split)) for split in ("train", "validation")] == [7, 3]


@pytest.mark.parametrize(("between", "end"), [("\n", "\n"), (",\n", "]")])
def test_lines_in_a_file_that_is_called_json(tmp_path: Path, between: str, end: str) -> None:
    """As pandas and Hugging Face's datasets export them."""
    chats = [json.dumps({"messages": [said("user", f"{number}?"), ANSWER]}) for number in range(3)]
    text = "\ufeff" + "[" * (end == "]") + between.join(chats) + end
    manifest = convert_raw(tmp_path, "messages", {"a.json": text.encode()})
    assert [values(row)[0] for row in rows(manifest, "train")] == ["0?", "1?", "2?"]
    assert manifest.complete
    manifest = convert_raw(tmp_path, "messages", {"a.json": b'{\n "messages": []\n}'})
    assert (manifest.rejected, manifest.complete) == ({"damaged": 1}, False)


def test_absolute_paths_are_below_the_image_root(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "1.png")
    chat = {"messages": [ASK, ANSWER], "images": [str(tmp_path / "images" / "1.png")]}
    manifest = convert_raw(tmp_path, "messages", {"a.jsonl": [chat]}, image_root=str(tmp_path / "images"))
    assert [row["image"] for row in rows(manifest, "train")] == ["1.png"]
    assert manifest.content["notes"] == {"image placeholder added": 1}
    for options, reason in (
        ({}, "is absolute; give the folder"),
        ({"image_root": str(tmp_path / "raw")}, "is not below"),
    ):
        (row,) = rows(convert_raw(tmp_path, "messages", {"a.jsonl": [chat]}, **options), "rejected")
        assert (row["kind"], reason in row["reason"]) == ("outside the image root", True)


def test_images_inside_the_file_are_written_below_the_image_root(tmp_path: Path) -> None:
    chats = [{"messages": [ASK, ANSWER], "images": [DATA, "1.png"]}]
    (tmp_path / "link").symlink_to(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    manifest = convert_raw(tmp_path, "messages", {"a.jsonl": chats}, image_root=str(tmp_path / "link"))
    assert [row["image"] for row in rows(manifest, "train")] == [[f"out/{STORED}", "1.png"]]
    assert (tmp_path / "out" / STORED).read_bytes() == base64.b64decode(png(1))
    manifest = convert_raw(tmp_path, "messages", {"a.jsonl": chats}, image_root=str(tmp_path / "raw"))
    (row,) = rows(manifest, "rejected")
    assert row["reason"].startswith(
        f"an image is part of the file, and {tmp_path / 'out'}, where it would be written, "
    )


SPELT = (
    "a chat is in 'messages', 'conversations', 'instruction' and 'output', "
    "'prompt' and 'completion', or 'query' and 'response';"
)
REJECTED = [
    ({"prompt": "a", "chosen": "b"}, "a chat is in 'messages', 'conversations', 'instruction' and 'output', 'prompt' "),
    ({"text": "a"}, f"{SPELT} the record has text"),
    ({}, f"{SPELT} the record has nothing"),
    ({"messages": {}}, "'messages' must be a list, got dict"),
    ({"messages": ["Hi", "Ho"]}, "expected an object, got 'Hi'"),
    ({"texts": [{"user": "a"}]}, "'assistant' must be text, got None"),
    ({"texts": ["a"]}, "expected an object, got 'a'"),
    ({"instruction": "a", "output": ["b"]}, "'output' must be text, got list"),
    ({"instruction": " ", "input": "", "output": "b"}, "turn 0 is empty"),
    ({"instruction": "a", "output": ""}, "turn 1 is empty"),
    ({"query": "a", "response": "b", "history": [["a"]]}, "'history' must be a list of [question, answer], got one"),
    ({"query": "a", "response": "b", "history": ["ab"]}, "'history' must be a list of [question, answer], got one"),
    ({"query": "a", "response": "b", "history": "ab"}, "'history' must be a list, got 'ab'"),
    ({"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]}, "'prompt' has an answer, but every answer is trained on"),
    ({"prompt": "a", "completion": ["b"]}, "expected an object, got 'b'"),
    ({"prompt": "a", "completion": "b", "label": False}, "'label' is False: the answer is one not to give"),
    ({"instruction": "a", "output": "b", "kto_tag": False}, "'kto_tag' is False: the answer is one not to give"),
    ({"messages": [ASK]}, "1 turn(s); a question and an answer are needed"),
    ({"messages": [ANSWER, ASK, ANSWER]}, "turn 0 is by 'assistant'."),
    ({"messages": [ASK, ANSWER, ASK]}, "the last turn has no answer"),
    ({"messages": [ASK, ASK, ANSWER, ANSWER]}, "turn 2 is by 'assistant' once more"),
    ({"messages": [ASK, said("user", " "), ANSWER]}, "turn 1 is by 'user' once more"),
    ({"messages": [said("user", " "), ASK, ANSWER]}, "turn 0 is empty"),
    ({"messages": [ASK, ANSWER, said("system", "x"), ANSWER]}, "turn 2 is by 'system'"),
    ({"messages": [said("system", "x"), said("system", "y"), ASK, ANSWER]}, "turn 0 is by 'system'"),
    ({"messages": [ASK, ANSWER, said("tool", "x"), ANSWER]}, "turn 2 is by 'tool'"),
    ({"messages": [said("system", "x"), ASK, ANSWER], "system": "x"}, "it has 'system' and a system message"),
    ({"messages": [ASK, said("assistant", None)]}, "'content' must be text, got None"),
    ({"messages": [ASK, said("assistant", None, tool_calls=[{}])]}, "turn 1: 'tool_calls' is not read; calls go"),
    ({"messages": [ASK, said("assistant", "3", reasoning_content="2 + 1")]}, "turn 1: 'reasoning_content' is not"),
    ({"messages": [ASK, said("assistant", "3", weight=0)]}, "turn 1: 'weight' is 0, but every answer is trained"),
    ({"messages": [ASK, said("assistant", "3", loss_weight=0.0)]}, "turn 1: 'loss_weight' is 0.0, but every answer"),
    ({"messages": [said("user", [{"type": "text"}]), ANSWER]}, "'text' must be text, got None"),
    ({"messages": [ASK, said("assistant", "3", loss=False)]}, "turn 1: 'loss' is False, but every answer is "),
    ({"messages": [ASK, ANSWER], "tools": [{}]}, "'tools' is not read; descriptions of tools go into the system"),
    ({"messages": [ASK, ANSWER], "videos": ["a.mp4"]}, "'videos' is not read; videos are not supported"),
    ({"messages": [said("user", [{"type": "input_audio"}]), ANSWER]}, "turn 0: parts are of type text, image or"),
    ({"messages": [said("user", [PICTURE]), ANSWER]}, "turn 0: an image has no path, and 'images' lists no more"),
    ({"messages": [said("user", [PICTURE]), ANSWER], "images": ["1.png", "2.png"]}, "it lists 2 image(s), but its "),
    ({"messages": [said("user", [{"type": "image", "url": 3}]), ANSWER]}, "turn 0: the path of an image must be"),
    ({"messages": [ASK, said("assistant", [PICTURE])], "images": ["1.png"]}, "turn 1 is an answer with '<image>'"),
    ({"messages": [said("user", "<image>?"), ANSWER]}, "1 '<image>' in the text but 0 image(s); where it is text,"),
    ({"messages": [said("user", "<image>?"), ANSWER], "images": ["1.png"] * 2}, "1 '<image>' in the text but 2 "),
    ({"messages": [said("user", [PICTURE, text("<image>?")]), ANSWER], "images": ["1.png"]}, "2 '<image>' in the "),
    ({"messages": [ASK, ANSWER], "images": [{"bytes": "x", "path": "1.png"}]}, "not base64: "),
    ({"messages": [ASK, ANSWER], "images": [{"bytes": None}]}, "'images' must be a list of paths, got one of None"),
    ({"messages": [ASK, ANSWER], "images": [["1.png"]]}, "'images' must be a list of paths, got one of list"),
    ({"messages": [ASK, ANSWER], "images": ["https://a.example/1.png"]}, "image 'https://a.example/1.png' is an add"),
    ({"messages": [ASK, ANSWER], "images": ["data:image/png;base64,AA"]}, "not base64: "),
    ({"messages": [ASK, ANSWER], "images": ["data:image/png;base64,AAAA"]}, "its content is no image that Pillow"),
    ({"messages": [ASK, ANSWER], "images": [f"{DATA}@@@@"]}, "not base64: "),
    ({"messages": [ASK, ANSWER], "images": ["data:image/png,AA"]}, "image 'data:image/png,AA' is not base64"),
    ({"messages": [ASK, ANSWER], "images": ["../1.png"]}, "image path '../1.png' must stay below the image root"),
]  # fmt: skip


def test_what_a_record_has_no_place_for_is_rejected(tmp_path: Path) -> None:
    good = {"messages": [ASK, ANSWER]}
    manifest = convert_raw(tmp_path, "messages", {"a.json": [good, *(chat for chat, _ in REJECTED), good]})
    found = rows(manifest, "rejected")
    assert [row["position"] for row in found] == [f"record {number}" for number in range(1, len(REJECTED) + 1)]
    for row, (_, reason) in zip(found, REJECTED, strict=True):
        assert f"{row['reason']}.".startswith(reason)
    assert len(rows(manifest, "train")) == 2
