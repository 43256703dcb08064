"""Cases of the linear loss and of the loss of given logits: check everybody, then time everybody in turn."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from bench import equality, floors, memory, turns
from bench.cases import DTYPES, LinearCase, LogitsCase, Preset
from bench.peers.base import Peer
from bench.problems import Problem, make
from bench.record import as_list, record
from bench.results import OK, Entry, Row
from bench.timing import Spread, Variant, clock_for, describe, interleaved, require_device


def loss_of(peer: Peer, problem: Problem) -> Tensor:
    if problem.weight_VD is None:
        return peer.loss_of_logits(problem.scores, problem.labels_M, problem.weighting)
    return peer.loss(problem.scores, problem.weight_VD, problem.labels_M, problem.weighting)


def run_step(peer: Peer, problem: Problem, case: LinearCase | LogitsCase) -> None:
    """What the mode of the case asks for, from inputs without gradients."""
    variant = variant_of(peer, problem, case)
    variant.run(variant.prepare())


def variant_of(peer: Peer, problem: Problem, case: LinearCase | LogitsCase) -> Variant:
    """What is timed: gradients are new tensors each time, as after ``zero_grad(set_to_none=True)``."""
    mode = case.mode if isinstance(case, LinearCase) else "train"

    def loss_only(_: None) -> Tensor:
        with torch.no_grad():
            return loss_of(peer, problem)

    def forward(_: None) -> Tensor:
        return loss_of(peer, problem)

    def backward(loss: Tensor) -> None:
        loss.backward()

    def both(_: None) -> None:
        loss_of(peer, problem).backward()

    def before_backward() -> Tensor:
        problem.clear()
        return loss_of(peer, problem)

    if mode == "backward":
        return Variant(backward, before_backward)
    return Variant({"loss": loss_only, "forward": forward}.get(mode, both), problem.clear)


def measure(case: LinearCase | LogitsCase, preset: Preset, device: torch.device, peers: Sequence[Peer]) -> Row:
    """Equality, memory and time of every peer on one case; nobody is dropped."""
    problem = make(case, device)
    entries = check(case, problem, peers)
    ready = [peer for peer in peers if entries[peer.name].status == OK]
    if isinstance(case, LinearCase) and case.memory and case.mode not in ("forward", "backward"):
        for peer in ready:
            turns.take(peer.name)
            _measure_memory(peer, problem, case, entries[peer.name])
    variants = {peer.name: variant_of(peer, problem, case) for peer in ready}
    if isinstance(case, LinearCase) and (products := floors.product_floor(case, device)) is not None:
        variants[floors.PRODUCTS] = products
    variants[floors.COPY], copied = floors.copy_floor(floors.copy_size(case), DTYPES[case.dtype], device)
    timings = interleaved(variants, clock_for(device), preset.rounds, preset.warmup, preset.seconds_per_variant)
    for peer in ready:
        record(entries[peer.name], timings)
    products_seconds = timings.samples.get(floors.PRODUCTS)
    copies = timings.samples.get(floors.COPY)
    return Row(
        suite=case.suite,
        label=case.label,
        case=asdict(case) | {"V": case.V, "N": case.N} | ({"D": case.D} if isinstance(case, LinearCase) else {}),
        entries=list(entries.values()),
        flops=case.flops if isinstance(case, LinearCase) else None,
        traffic=case.traffic,
        products=as_list(Spread.of(products_seconds)) if products_seconds else None,
        bandwidth=copied / Spread.of(copies).median if copies else None,
    )


def check(case: LinearCase | LogitsCase, problem: Problem, peers: Sequence[Peer]) -> dict[str, Entry]:
    """Compare every peer with float64."""
    device = problem.scores.device
    return equality.check(
        peers,
        device,
        DTYPES[case.dtype],
        equality.exact(problem),
        lambda peer: equality.evaluate(problem, lambda: loss_of(peer, problem)),
        lambda: release(problem),
        lambda peer: _too_large(peer, case, device),
    )


def _too_large(peer: Peer, case: LinearCase | LogitsCase, device: torch.device) -> str | None:
    if device.type != "cuda" or not peer.materialises or not isinstance(case, LinearCase):
        return None
    rows = case.N if peer.skips_ignored else case.M
    needed, (free, _) = 16.0 * rows * case.V, torch.cuda.mem_get_info(device)
    if needed <= free:
        return None
    return f"does not fit: the logits need about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"


def _measure_memory(peer: Peer, problem: Problem, case: LinearCase, entry: Entry) -> None:
    release(problem)
    try:
        if problem.scores.is_cuda:
            outputs = sum(leaf.nbytes for leaf in problem.leaves.values())
            entry.memory = memory.cuda_peak(lambda: run_step(peer, problem, case), outputs)
        else:
            entry.memory = memory.process_peak(peer.name, case)
    except Exception as error:
        require_device()
        entry.memory_error = describe(error)
    release(problem)


def release(problem: Problem) -> None:
    """Free gradients and what the allocator keeps, so that peers do not run in each other's memory."""
    problem.clear()
    gc.collect()
    if problem.scores.is_cuda:
        torch.cuda.empty_cache()
