"""Records for evaluations: with and without images, prompts of many lengths; and what an evaluation leaves of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

COUNT = 23  # with batches of 4, each set ends in a ragged one
# fmt: off
WORDS = [
    "square", "circle", "left", "of", "the", "red", "green", "blue", "yellow", "picture", "above",
    "below", "between", "many", "few", "two", "three",
]
# fmt: on


def write_questions(folder: Path) -> Path:
    """``mixed.jsonl``: every third record without an image, prompts of many lengths, the longest in the middle."""
    (folder / "images").mkdir()
    rows = []
    for number in range(COUNT):
        words = [WORDS[(7 * number + k) % len(WORDS)] for k in range(1 + (number * 5) % 17)]
        row: dict[str, Any] = {"id": f"r{number}", "references": [WORDS[number % 5], "other"]}
        question = " ".join(words) + "?"
        if number % 3:
            row["image"] = f"images/{number}.png"
            Image.new("RGB", (64, 64), (40 * (number % 7), 11 * number, 255 - 9 * number)).save(folder / row["image"])
            question = f"<image>\n{question}"
        answer = " ".join(WORDS[number % 5 : number % 5 + 1 + number % 4])
        row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append(row)
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "predictions.jsonl").read_bytes().splitlines()]
