"""What a run leaves behind: one JSON file that can be read back without this machine.

    {"schema": 1, "preset": "cpu", "command": "...", "environment": {...}, "rows": [{"case": ..., "entries": [...]}]}

Times are seconds, sizes bytes, ratios are to this repository's own entry of the same row.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
OK, UNAVAILABLE, UNSUPPORTED, FAILED = "ok", "unavailable", "unsupported", "failed"
STOPS = "left out"  # in a run's environment: {peer: {"case": ..., "error": ...}}, peers that stopped the run
STATUSES = (OK, UNAVAILABLE, UNSUPPORTED, FAILED)


@dataclass
class Entry:
    """One variant of a row. Without ``status == "ok"`` there is an ``error`` and no time."""

    name: str
    status: str
    error: str | None = None
    version: str | None = None
    seconds: list[float] | None = None  # low quartile, median, high quartile
    samples: list[float] = field(default_factory=list)  # seconds of every round
    retried: int = 0  # samples that hold time in which the allocator freed memory and asked for it again
    ratio: list[float] | None = None  # of times to ours within each round: low quartile, median, high quartile
    memory: int | None = None  # bytes beyond inputs and outputs
    memory_error: str | None = None
    deviations: dict[str, float] | None = None  # from float64
    allowed: dict[str, float] | None = None
    tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {self.status!r}")
        if (self.status == OK) == (self.seconds is None):
            raise ValueError(f"{self.name}: an entry has a time exactly if its status is 'ok', got {self.status!r}")


@dataclass
class Row:
    """One case: what was to be computed, the floors, and everybody who was asked to."""

    suite: str
    label: str
    case: dict[str, Any]
    entries: list[Entry]
    flops: float | None = None  # counted: what the mode needs over the supervised rows
    traffic: int | None = None  # counted: bytes that cannot be avoided
    products: list[float] | None = None  # seconds of the bare products: low quartile, median, high quartile
    bandwidth: float | None = None  # bytes per second of a device copy in the same rounds
    skipped: str | None = None  # why the whole case did not run

    @property
    def floor(self) -> float | None:
        """Seconds of the bare products, or of the unavoidable bytes at the copy's rate where there are none."""
        if self.products is not None:
            return self.products[1]
        if self.suite == "logits" and self.traffic and self.bandwidth:
            return self.traffic / self.bandwidth
        return None

    def entry(self, name: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.name == name), None)


@dataclass
class Run:
    """All rows of one command on one device."""

    preset: str
    command: str
    started: str
    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    schema: int = SCHEMA

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Run:
        """Raises ``ValueError`` naming the file and what is wrong with it."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.get("schema") != SCHEMA:
                raise ValueError(f"schema {data.get('schema')!r} instead of {SCHEMA}; run the preset again")
            rows = [Row(**{**row, "entries": [Entry(**entry) for entry in row["entries"]]}) for row in data.pop("rows")]
            return cls(rows=rows, **data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a result of `python -m bench run`: {error}") from error
