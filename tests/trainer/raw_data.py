"""Small data sets in the true raw formats, made here."""

from __future__ import annotations

import base64
import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.data.converters.conversion import Manifest, convert

PAPER = "cotbal-paper"
Files = dict[str, Any]  # relative path -> data; .jsonl: a list of rows, .p: pickled, else JSON


def png(number: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def vqav2() -> Files:
    files: Files = {}
    for year, first, images in (("train2014", 0, 3), ("val2014", 900, 2)):
        questions, annotations = [], []
        for number in range(images * 3):
            image, question = first + number // 3, first * 1000 + number
            questions.append({"image_id": image, "question": f"What is {question}?", "question_id": question})
            answers = [{"answer": f"a{question}" if i else "other", "answer_id": i + 1} for i in range(10)]
            annotations.append({
                "question_id": question, "image_id": image, "answer_type": "other", "question_type": "what is",
                "multiple_choice_answer": f"a{question}", "answers": answers,
            })  # fmt: skip
        head = {"info": {"year": 2014, "nested": {"list": [1, [2]]}}, "license": [{"url": "x"}], "data_type": "mscoco"}
        files[f"v2_OpenEnded_mscoco_{year}_questions.json"] = head | {"questions": questions}
        files[f"v2_mscoco_{year}_annotations.json"] = head | {"annotations": annotations[::-1]}
    return files


def gqa() -> Files:
    def question(image: str, number: int, balanced: bool = True) -> dict[str, Any]:
        return {
            "imageId": image, "question": f"Is it {number}?", "answer": "yes" if number % 2 else "no",
            "fullAnswer": f"Yes, it is {number}.", "isBalanced": balanced, "semantic": [],
        }  # fmt: skip

    return {
        "train_balanced_questions.json": {f"t{i}": question(str(10 + i // 3), i, i != 5) for i in range(9)},
        "val_balanced_questions.json": {f"v{i}": question(f"n{i}", i) for i in range(6)},
        "testdev_balanced_questions.json": {f"d{i}": question("n99", i) for i in range(2)},
    }


def chartqa() -> Files:
    files: Files = {}
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for kind in ("human", "augmented"):
            files[f"{split}/{split}_{kind}.json"] = [
                {"imgname": f"{split}{i}.png", "query": f"{kind} {split} {i}?", "label": f"{i}.5"} for i in range(count)
            ]
    return files


def ocrvqa() -> Files:
    def book(number: int, split: int) -> dict[str, Any]:
        return {
            "imageURL": f"http://ecx.images.example/I/{number}L.jpg?size=2", "title": f"T{number}", "genre": "g",
            "questions": [f"Who wrote {number}?", f"Is {number} a novel?"], "answers": [f"W{number}", "No"],
            "authorName": f"W{number}", "split": split,
        }  # fmt: skip

    splits = [1, 1, 1, 1, 2, 2, 3]
    return {"dataset.json": {f"{i:010d}": book(i, split) for i, split in enumerate(splits)}}


SENTENCES = 5  # about each reference of the training image


def refcoco() -> Files:
    files: Files = {}
    for name, by in (("refcoco", "unc"), ("refcocog", "umd")):
        splits = ["train", "train", "val", *(["testA", "testB"] if name == "refcoco" else ["test"])]
        refs, annotations, images = [], [], []
        for number, split in enumerate(splits):
            image = 7 if split == "train" else 100 + number
            if all(entry["id"] != image for entry in images):
                images.append(
                    {"id": image, "file_name": f"COCO_train2014_{image:012d}.jpg", "width": 200, "height": 100}
                )
            annotations.append({
                "id": 50 + number, "image_id": image, "category_id": 1, "bbox": [20.0 + number, 10.0, 100.0, 50.0],
                "segmentation": [[1.0] * 12],
            })  # fmt: skip
            refs.append({
                "ref_id": number, "ann_id": 50 + number, "image_id": image, "split": split, "category_id": 1,
                "file_name": f"COCO_train2014_{image:012d}_{number}.jpg", "sent_ids": [],
                "sentences": [{"sent": f"{name} {split} {number} {i}", "tokens": []} for i in range(SENTENCES)],
            })  # fmt: skip
        files[f"{name}/refs({by}).p"] = refs
        files[f"{name}/instances.json"] = {"info": {}, "images": images, "annotations": annotations, "categories": []}
    return files


def llava(with_image: bool = True, count: int = 9) -> list[Any]:
    rows: list[Any] = []
    for number in range(count):
        question = f"<image>\nSay {number}." if with_image and number else f"Say {number}."
        row = {
            "id": f"r{number}",
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": f"Said number {number}."}],
        }
        rows.append({**row, "image": f"coco/{number}.jpg"} if with_image else row)
    return rows


def mix665k() -> Files:
    text = {"id": "t", "model": "", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    return {"llava_v1_5_mix665k.json": [*llava(), text]}


def m3it() -> Files:
    def row(number: int) -> dict[str, Any]:
        return {
            "instruction": "Look.", "inputs": f"Q{number}" if number else "", "image_base64_str": [png(number)],
            "outputs": f"A{number}",
        }  # fmt: skip

    return {
        "data/vqa/train.jsonl": [row(i) for i in range(4)],
        "data/vqa/validation.jsonl": [row(2)],
        "data/cap/test.jsonl": [row(3)],
    }


def xtreme_up() -> Files:
    def row(number: int) -> dict[str, Any]:
        return {"question": f"q{number}?", "title": "T", "context": f"c{number} नमस्ते", "target": f"c{number}"}

    return {
        "qa_in_lang/train/te.jsonl": [row(i) for i in range(4)],
        "qa_in_lang/validation/te.jsonl": [row(7)],
        "qa_in_lang/test/te.jsonl": [row(8)],
    }


def mftcoder() -> Files:
    def rounds(number: int) -> dict[str, Any]:
        chat = [{"role": "human", "content": f"Sort {number}"}, {"role": "bot", "content": f"  sorted({number})\n"}]
        if number % 2:
            chat.insert(0, {"role": "system", "content": "Be brief."})
            chat += [{"role": "human", "content": "Why?"}, {"role": "bot", "content": "Because."}]
        return {"id": number, "data_name": "code", "chat_rounds": chat}

    return {"sort/a.jsonl": [rounds(i) for i in range(4)], "b.jsonl": [rounds(i) for i in range(3)]}


def messages() -> Files:
    def chat(number: int) -> dict[str, Any]:
        return {
            "messages": [{"role": "user", "content": f"Say {number}."}, {"role": "assistant", "content": f"S{number}"}]
        }

    def parts(number: int) -> dict[str, Any]:
        about = [
            {"type": "image_url", "image_url": {"url": f"{number}.jpg"}},
            {"type": "text", "text": f"See {number}?"},
        ]
        brief = {"role": "system", "content": "Be brief."}
        said = {"role": "assistant", "content": [{"type": "text", "text": f"S{number}"}]}
        return {"messages": [brief, {"role": "user", "content": about}, said]}

    return {"train.jsonl": [*map(chat, range(3)), *map(parts, range(3, 6))], "more/val.json": [chat(7), parts(8)]}


RAW = {
    "sharegpt4v": lambda: {"sharegpt4v_instruct_gpt4-vision_cap100k.json": llava()},
    "vqav2": vqav2,
    "gqa": gqa,
    "chartqa": chartqa,
    "ocrvqa": ocrvqa,
    "refcoco-caption": refcoco,
    "refcoco-bbox": refcoco,
    "sharegpt": lambda: {"sg_1.json": llava(with_image=False)},
    "llava-mix665k": mix665k,
    "m3it": m3it,
    "xtreme-up-qa": xtreme_up,
    "mftcoder": mftcoder,
    "messages": messages,
}


def encoded(path: str, data: Any) -> bytes:
    """The bytes of a raw file."""
    if path.endswith(".p"):
        return pickle.dumps(data, protocol=0)
    if path.endswith(".jsonl"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data).encode("utf-8", "surrogatepass")
    return json.dumps(data).encode()


def write_raw(folder: Path, files: Files) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data if isinstance(data, bytes) else encoded(path, data))
    return folder


def convert_raw(
    tmp: Path, name: str, files: Files | None = None, preset: str | None = None, **options: Any
) -> Manifest:
    """Writes raw files to ``tmp/raw`` and converts them to ``tmp/out``, replacing what is there."""
    write_raw(tmp / "raw", RAW[name]() if files is None else files)
    return convert(name, tmp / "raw", tmp / "out", options, preset=preset, overwrite=True)


def rows(manifest: Manifest, split: str) -> list[dict[str, Any]]:
    path = manifest.path.with_name(f"{split}.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def values(row: dict[str, Any]) -> list[str]:
    """What a record's turns say."""
    return [turn["value"] for turn in row["conversations"]]


def questions(manifest: Manifest) -> Mapping[tuple[Any, ...], int]:
    """How often each (output, image, question, answer, references) was written."""
    found: dict[tuple[Any, ...], int] = {}
    for split in manifest.outputs:
        for row in rows(manifest, split):
            turns = [turn for turn in row["conversations"] if turn["from"] != "system"]
            values = [turn["value"].removeprefix("<image>\n") for turn in turns]
            for question, answer in zip(values[::2], values[1::2], strict=True):
                key = (split, str(row.get("image")), question, answer, tuple(row.get("references", ())))
                found[key] = found.get(key, 0) + 1
    return found
