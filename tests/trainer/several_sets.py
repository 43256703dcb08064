"""A run whose tasks have several test sets and metrics, for the tests of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.data.records import write_jsonl


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_test_sets(run_data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The small run; "colour" with 2 test sets x 2 metrics, "box" with 2 x 1, a lower one being better."""
    colour, box, _ = run_data["tasks"]
    train = rows_of(Path(colour["train"]))
    write_jsonl(folder / "b.jsonl", [train[0], train[4], train[1]])  # red, red, green
    colour["test"] = {"testA+": colour["test"], "testB": str(folder / "b.jsonl")}
    colour["test_metrics"] = ["span_f1", "exact_match"]
    box["test"] = {"near": box["test"], "far": box["validation"]}
    box |= {"metric": "exact_match", "test_metrics": ["perplexity"]}
    return run_data | {"comparisons": ["stl", "ew"]}
