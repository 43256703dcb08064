"""Every peer is compared with float64 before it is timed: a number for another function is worth nothing.

Legend: M positions, N supervised positions, C of them at a time, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import turns
from bench.peers import MATERIALISED
from bench.peers.base import IGNORED, Peer, UnsupportedError
from bench.problems import Problem
from bench.results import FAILED, OK, UNAVAILABLE, UNSUPPORTED, Entry
from bench.timing import describe, require_device

# The upstream gradient while checking: a kernel that takes gradients in its forward pass must still multiply by it.
UPSTREAM = 0.5
CHUNK_BYTES = 2 * 2**30  # of float64 logits

# Deviations that rounding alone explains, whatever the order of the sums.
ROUNDING = {
    # float32 sums of up to 2**17 terms (the vocabulary): sqrt(2**17) * 2**-24.
    torch.float32: 2.2e-5,
    # A weight gradient summed in the dtype of the weight over 32 chunks is rounded 32 times: sqrt(32) * 2**-9 ...
    torch.bfloat16: 1.1e-2,
    # ... and sqrt(32) * 2**-12.
    torch.float16: 1.4e-3,
}
# Of a gradient that is summed in 16 bits, block by block: a part below half a unit in the last place of what is there
# is lost. Emulated with 250 to 1000 blocks of 128 words in bfloat16, rows lose up to 3.5e-2. Who forgets a row, a
# weight or the upstream gradient is off by more than a tenth.
NARROW_SUMS = 0.1
MARGIN = 1.5  # over the error of the materialised path in the same dtype on the same inputs


class NotEqualError(Exception):
    """The peer computes something else."""


@dataclass(frozen=True)
class Values:
    """Loss and the gradients of the inputs that want one ("scores", "weight")."""

    loss: Tensor
    gradients: dict[str, Tensor]


def evaluate(problem: Problem, loss: Callable[[], Tensor]) -> Values:
    """Loss and gradients of a peer, the gradients divided by the upstream one."""
    problem.clear()
    if not problem.leaves:
        with torch.no_grad():
            return Values(loss().detach(), {})
    value = loss()
    (value * UPSTREAM).backward()
    found: dict[str, Tensor] = {}
    for name, leaf in problem.leaves.items():
        if leaf.grad is None:
            raise NotEqualError(f"gives no gradient for {name}")
        found[name], leaf.grad = leaf.grad / UPSTREAM, None  # exact: a power of two
    return Values(value.detach(), found)


@torch.no_grad()
def exact(problem: Problem) -> Values:
    """Eq. 2 and its gradients in float64, from their formulas: autograd and the peers' code have no part in it."""
    rows_N = (problem.labels_M != IGNORED).nonzero().squeeze(1)
    weights_N = torch.ones(rows_N.shape, dtype=torch.float64, device=rows_N.device)
    if problem.weighting is not None:
        task_ids_M, task_weights_K = problem.weighting
        weights_N = task_weights_K.double()[task_ids_M[rows_N]]
    weights_N = weights_N / weights_N.sum()
    head_VD = None if problem.weight_VD is None else problem.weight_VD.double()
    gradients = {name: torch.zeros(leaf.shape, dtype=torch.float64, device=leaf.device)
                 for name, leaf in problem.leaves.items()}  # fmt: skip
    loss = torch.zeros((), dtype=torch.float64, device=rows_N.device)
    vocabulary = problem.scores.shape[1] if head_VD is None else head_VD.shape[0]
    size = max(1, CHUNK_BYTES // (8 * vocabulary))
    for rows_C, weights_C in zip(rows_N.split(size), weights_N.split(size), strict=True):
        scores_C = problem.scores[rows_C].double()
        targets_C1 = problem.labels_M[rows_C][:, None]
        logits_CV = scores_C if head_VD is None else scores_C @ head_VD.t()
        lse_C1 = logits_CV.logsumexp(1, keepdim=True)
        loss += (weights_C * (lse_C1 - logits_CV.gather(1, targets_C1)).squeeze(1)).sum()
        if not gradients:
            continue
        grad_CV = logits_CV.sub_(lse_C1).exp_()
        grad_CV.scatter_add_(1, targets_C1, -torch.ones_like(lse_C1)).mul_(weights_C[:, None])
        gradients["scores"][rows_C] = grad_CV if head_VD is None else grad_CV @ head_VD
        if "weight" in gradients:
            gradients["weight"].addmm_(grad_CV.t(), scores_C)
    return Values(loss, gradients)


def deviations(found: Values, expected: Values) -> dict[str, float]:
    """How far each result is from float64.

    The loss: relative. A gradient: the largest error of a row over the largest row, in the Euclidean norm, so that one
    position or one vocabulary entry that is forgotten shows however many others there are.
    """
    result = {"loss": float((found.loss.double() - expected.loss).abs() / expected.loss.abs())}
    for name, reference in expected.gradients.items():
        if found.gradients[name].shape != reference.shape:
            raise NotEqualError(f"gradient of {name} has shape {tuple(found.gradients[name].shape)}")
        largest, worst = torch.zeros((2,), dtype=torch.float64, device=reference.device)
        for rows, found_rows in zip(reference.split(8192), found.gradients[name].split(8192), strict=True):
            largest = torch.maximum(largest, rows.norm(dim=1).max())
            worst = torch.maximum(worst, (found_rows.double() - rows).norm(dim=1).max())
        result[name] = float(worst / largest)
    return result


def limits(materialised: dict[str, float] | None, dtype: torch.dtype, names: list[str]) -> dict[str, float]:
    """What a peer may deviate: what rounding explains, or 1.5 times the materialised path where that has more."""
    return {name: max(ROUNDING[dtype], MARGIN * (materialised or {}).get(name, 0.0)) for name in names}


def require_equal(found: dict[str, float], allowed: dict[str, float]) -> None:
    """Raise :class:`NotEqualError` with every quantity that is too far off; NaN is."""
    wrong = [
        f"{name} is off by {found[name]:.1e} (at most {limit:.1e})"
        for name, limit in allowed.items()
        if not found[name] <= limit
    ]
    if wrong:
        raise NotEqualError("computes another function: " + ", ".join(wrong))


def judged(peer: Peer, found: dict[str, float], allowed: dict[str, float]) -> Entry:
    """The peer's entry with its deviations: "ok" and a time of zero rounds, or failed."""
    if peer.sums_narrow:
        allowed = {name: limit if name == "loss" else max(limit, NARROW_SUMS) for name, limit in allowed.items()}
    try:
        require_equal(found, allowed)
    except NotEqualError as error:
        return Entry(peer.name, FAILED, str(error), peer.version(), deviations=found, allowed=allowed)
    return Entry(peer.name, OK, version=peer.version(), seconds=[0.0] * 3, deviations=found, allowed=allowed)


def check(
    peers: Sequence[Peer],
    device: torch.device,
    dtype: torch.dtype,
    expected: Values,
    evaluate: Callable[[Peer], Values],
    release: Callable[[], None],
    too_large: Callable[[Peer], str | None] = lambda peer: None,
) -> dict[str, Entry]:
    """Compare every peer with ``expected``. Entries that are "ok" have their deviations and a time of zero rounds.

    ``release`` frees what a peer leaves behind; ``too_large`` says why one cannot be tried at all.
    """

    def outcome(peer: Peer) -> Entry | dict[str, float]:
        if reason := peer.unavailable(device):
            return Entry(peer.name, UNAVAILABLE, reason)
        if reason := too_large(peer):
            return Entry(peer.name, FAILED, reason, peer.version())
        try:
            return deviations(evaluate(peer), expected)
        except UnsupportedError as error:
            return Entry(peer.name, UNSUPPORTED, str(error), peer.version())
        except NotEqualError as error:
            return Entry(peer.name, FAILED, str(error), peer.version())
        except Exception as error:
            require_device()
            return Entry(peer.name, FAILED, describe(error), peer.version())

    found: dict[str, Entry | dict[str, float]] = {}
    for peer in peers:
        turns.take(peer.name)
        found[peer.name] = outcome(peer)
        release()
    # Without the materialised path what rounding explains remains as the limit.
    materialised = found.get(MATERIALISED)
    names = ["loss", *expected.gradients]
    allowed = limits(materialised if isinstance(materialised, dict) else None, dtype, names)
    return {
        peer.name: entry if isinstance(entry := found[peer.name], Entry) else judged(peer, entry, allowed)
        for peer in peers
    }
