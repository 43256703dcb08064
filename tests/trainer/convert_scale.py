"""Converts a generated file of many records and prints its peak memory and rate as JSON.

    python tests/trainer/convert_scale.py 2000000 /some/large/folder

``--merge`` converts GQA questions, four to an image, which are joined and sorted on disk; without it the records are
LLaVA conversations.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from trainer.data.converters.conversion import convert


def write_llava(path: Path, count: int) -> None:
    with path.open("w") as file:
        for number in range(count):
            turns = [
                {
                    "from": "human",
                    "value": f"<image>\nWhat can be seen in picture number {number}? Say it in one sentence.",
                },
                {"from": "gpt", "value": f"A street with {number % 97} cars, {number % 89} trees and a house. " * 3},
            ]
            row = {"id": f"r{number}", "image": f"coco/train2017/{number:012d}.jpg", "conversations": turns}
            file.write(("[" if number == 0 else ",\n") + json.dumps(row))
        file.write("]")


def write_gqa(path: Path, count: int) -> None:
    with path.open("w") as file:
        for number in range(count):
            row = {
                "imageId": str(number // 4), "question": f"Is there a car of kind {number}?", "answer": "yes",
                "fullAnswer": "Yes, there is.", "isBalanced": True, "semantic": [{"operation": "exist"}],
            }  # fmt: skip
            file.write(("{" if number == 0 else ",\n") + f'"{number}": ' + json.dumps(row))
        file.write("}")


def peak_memory() -> int:
    """Largest resident size of this program in bytes; getrusage would count whoever started it as well."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    count, folder = int(sys.argv[1]), Path(sys.argv[2])
    merge = "--merge" in sys.argv
    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / ("train_balanced_questions.json" if merge else "raw.json")
    (write_gqa if merge else write_llava)(raw, count)
    started = time.perf_counter()
    if merge:
        manifest = convert("gqa", folder, folder / "out", preset="cotbal-paper")
    else:
        manifest = convert("llava-mix665k", raw, folder / "out")
    seconds = time.perf_counter() - started
    print(
        json.dumps(
            {
                "questions": manifest.outputs["train"]["questions"],
                "records": manifest.outputs["train"]["records"],
                "raw_bytes": raw.stat().st_size,
                "peak_bytes": peak_memory(),
                "seconds": round(seconds, 2),
                "records_per_second": round(count / seconds),
                "load": os.getloadavg()[0],
            }
        )
    )


if __name__ == "__main__":
    main()
