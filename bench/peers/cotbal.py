"""This repository's own loss."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from bench.peers.base import Peer, Weighting
from cotbal_kernels import linear_task_cross_entropy, task_cross_entropy
from cotbal_kernels.backends import resolve_backend

ALL_ROWS = 2**20  # as chunk_size: a workspace for all logits at once, at any M of a case


class Cotbal(Peer):
    """``linear_task_cross_entropy``, with options of it; per-task sums, counts and accuracy are always computed too."""

    about = "this repository; ignored rows are left out, per-task sums and accuracy come with it"
    skips_ignored = True

    def __init__(self, name: str, backend: str = "auto", **options: Any) -> None:
        self.name, self.options = name, {"backend": backend, **options}

    def unavailable(self, device: torch.device) -> str | None:
        try:
            resolve_backend(self.options["backend"], device)
        except ValueError as error:
            return str(error)
        return None

    def version(self) -> str:
        try:
            return version("cotbal")
        except PackageNotFoundError:  # run from a checkout
            return "checkout"

    def loss(self, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        ids, weights = weighting or _uniform(labels_M)
        return linear_task_cross_entropy(hidden_MD, weight_VD, labels_M, ids, weights, **self.options).loss

    def loss_of_logits(self, logits_MV: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        ids, weights = weighting or _uniform(labels_M)
        return task_cross_entropy(logits_MV, labels_M, ids, weights, backend=self.options["backend"]).loss


class CotbalAllLogits(Cotbal):
    """The workspace holds the logits of all supervised rows: 3 F at any M, memory as kernels that keep them take."""

    about = "this repository, workspace for all logits at once: 3 F at any M"
    loss_of_logits = Peer.loss_of_logits  # logits that exist have no workspace

    def __init__(self, name: str) -> None:
        super().__init__(name, chunk_size=ALL_ROWS)

    def unavailable(self, device: torch.device) -> str | None:
        # The portable backend computes no logits twice whatever its workspace.
        if device.type != "cuda":
            return "runs on CUDA devices only"
        return super().unavailable(device)


def _uniform(labels_M: Tensor) -> Weighting:
    return Weighting(torch.zeros_like(labels_M), torch.ones(1, device=labels_M.device))
