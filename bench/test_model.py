"""A whole training step and an evaluation of losses of a LLaVA-shaped model."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import ModelCase
from bench.conftest import PRESET, Compare
from bench.peers import all_peers

pytest.importorskip("transformers", reason="the model is one of transformers'")
CASES = [case for case in PRESET.cases if isinstance(case, ModelCase)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "training" if case.train else "evaluation")
@pytest.mark.parametrize("peer", [peer.name for peer in all_peers()])
def test_model(benchmark: BenchmarkFixture, compare: Compare, case: ModelCase, peer: str) -> None:
    entry = compare(benchmark, case, peer)
    benchmark.extra_info["tokens per second"] = entry.tokens_per_second
