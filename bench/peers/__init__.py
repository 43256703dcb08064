"""Ways to compute the loss, one small file each. A peer whose package is absent is listed, never dropped."""

from __future__ import annotations

from bench.peers.base import Peer
from bench.peers.compiled import Compiled
from bench.peers.cotbal import Cotbal, CotbalAllLogits
from bench.peers.cut_cross_entropy_peer import CutCrossEntropy, CutCrossEntropyCompiled
from bench.peers.eager import Eager
from bench.peers.liger import Liger, LigerFloat32
from bench.peers.quack_peer import Quack
from bench.peers.token_chunks import TokenChunks
from bench.peers.torch_fused import TorchChunked, TorchFused
from bench.peers.vocabulary_chunks import VocabularyChunks

OURS = "cotbal"
MATERIALISED = "eager"


def all_peers() -> list[Peer]:
    """Ours first; every ratio is against it. ``eager`` is the path whose error bounds the others'."""
    return [
        Cotbal(OURS),
        Cotbal("cotbal (cuda)", backend="cuda"),
        CotbalAllLogits("cotbal (all logits)"),
        Eager(),
        Compiled(),
        TorchFused(),
        TorchChunked(),
        TokenChunks(),
        VocabularyChunks(),
        CutCrossEntropy(),
        CutCrossEntropyCompiled(),
        Liger(),
        LigerFloat32(),
        Quack(),
    ]


def by_name(name: str) -> Peer:
    """The peer of this name."""
    for peer in all_peers():
        if peer.name == name:
            return peer
    raise ValueError(f"there is no peer {name!r}; there are {', '.join(peer.name for peer in all_peers())}")
