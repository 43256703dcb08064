"""Results survive the file, and a file of something else is refused by name."""

import json
from pathlib import Path

import pytest
from example_run import example_run

from bench.results import Entry, Run


def test_round_trip(tmp_path: Path) -> None:
    run = example_run()
    path = tmp_path / "deep" / "cpu.json"
    run.write(path)
    assert Run.read(path) == run
    assert [found.name for found in path.parent.iterdir()] == ["cpu.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 7}, "schema 7 instead of 1; run the preset again"),
        ({"rows": [{"suite": "linear"}]}, "entries"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "cpu.json"
    example_run().write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"cpu.json is not a result of .*{message}"):
        Run.read(path)


def test_not_even_json(tmp_path: Path) -> None:
    (tmp_path / "cpu.json").write_text("{")
    with pytest.raises(ValueError, match=r"cpu\.json is not a result"):
        Run.read(tmp_path / "cpu.json")


def test_an_entry_has_a_time_exactly_if_it_is_ok() -> None:
    with pytest.raises(ValueError, match="fast: an entry has a time exactly if"):
        Entry("fast", "ok")
    with pytest.raises(ValueError, match="fast: an entry has a time exactly if"):
        Entry("fast", "failed", "why", seconds=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="status must be one of ok, unavailable, unsupported, failed, got 'fine'"):
        Entry("fast", "fine")


def test_floor_is_the_products_or_the_bytes_at_the_rate_of_a_copy() -> None:
    linear, logits = example_run().rows[:2]
    assert linear.floor == 0.01
    assert logits.floor == pytest.approx(3e6 / 2e9, rel=1e-15)  # bytes over bytes per second
    linear.products = None
    assert linear.floor is None
