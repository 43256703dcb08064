"""One step of the convergence balancer."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.balancer import GRAPH, HOST, PORTABLE
from bench.cases import BalancerCase
from bench.conftest import PRESET, Compare
from bench.peers import OURS

CASES = [case for case in PRESET.cases if isinstance(case, BalancerCase)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"K{case.tasks}-N{case.window}")
@pytest.mark.parametrize("variant", [OURS, PORTABLE, GRAPH, HOST])
def test_balancer_step(benchmark: BenchmarkFixture, compare: Compare, case: BalancerCase, variant: str) -> None:
    compare(benchmark, case, variant)
