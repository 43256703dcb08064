"""Records as LLaVA's files have them, and files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
