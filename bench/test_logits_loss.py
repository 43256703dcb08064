"""Loss of logits that exist, forward and backward."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import LogitsCase
from bench.conftest import PRESET, Compare
from bench.peers import all_peers
from bench.peers.base import Peer

CASES = [case for case in PRESET.cases if isinstance(case, LogitsCase)]
PEERS = [peer.name for peer in all_peers() if type(peer).loss_of_logits is not Peer.loss_of_logits]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.supervised:.0%}-K{case.tasks}")
@pytest.mark.parametrize("peer", PEERS)
def test_logits_loss(benchmark: BenchmarkFixture, compare: Compare, case: LogitsCase, peer: str) -> None:
    compare(benchmark, case, peer)
