"""The suites measure each case once, all variants in turn, and hand pytest-benchmark the samples of every variant."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import PRESETS, Case
from bench.peers import all_peers
from bench.results import FAILED, OK, Entry, Row
from bench.run import measure

Compare = Callable[[BenchmarkFixture, Case, str], Entry]
PRESET = PRESETS["quick"]


@pytest.fixture(scope="session")
def measured() -> Callable[[Case], Row]:
    """Measures a case when it is first asked for."""
    rows: dict[Case, Row] = {}
    # The sizes are those of a CPU; on a GPU they run all the same, and `python -m bench run` has the others.
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    peers = all_peers()

    def row_of(case: Case) -> Row:
        if case not in rows:
            rows[case] = measure(case, PRESET, device, peers)
        return rows[case]

    return row_of


@pytest.fixture
def compare(measured: Callable[[Case], Row]) -> Compare:
    """Reports one variant of one case: its samples, or why there are none. A peer that fails fails the test."""

    def report(benchmark: BenchmarkFixture, case: Case, name: str) -> Entry:
        row = measured(case)
        entry = row.entry(name)
        if entry is None:
            pytest.skip(f"{name} takes no part in this case")
        if entry.status == FAILED:
            pytest.fail(f"{name}: {entry.error}")
        if entry.status != OK:
            pytest.skip(str(entry.error))
        benchmark.group = case.label
        benchmark.extra_info.update({"x ours": entry.ratio, "x floor": _over_floor(entry, row)})
        replay(benchmark, entry.samples)
        return entry

    return report


def replay(benchmark: BenchmarkFixture, samples: list[float]) -> None:
    """Let pytest-benchmark's clock tell the measured durations: a round is two readings."""
    benchmark._timer = itertools.chain.from_iterable((0.0, sample) for sample in samples).__next__
    benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)


def _over_floor(entry: Entry, row: Row) -> float | None:
    return entry.seconds[1] / row.floor if entry.seconds and row.floor else None
