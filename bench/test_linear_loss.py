"""Loss of a linear head: forward and backward, each alone, loss only, frozen head, with task weights.

pytest bench/ --benchmark-only
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import LinearCase
from bench.conftest import PRESET, Compare
from bench.peers import all_peers

CASES = [case for case in PRESET.cases if isinstance(case, LinearCase)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.mode}-{case.supervised:.0%}-K{case.tasks}")
@pytest.mark.parametrize("peer", [peer.name for peer in all_peers()])
def test_linear_loss(benchmark: BenchmarkFixture, compare: Compare, case: LinearCase, peer: str) -> None:
    compare(benchmark, case, peer)
