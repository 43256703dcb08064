"""The fused loss beside its own library products and beside dense PyTorch, in turns within one run.

Products are those the loss cannot do without: 3 of 2 N V D flop for loss and gradients, 1 for the loss.
"""

# Shapes: M positions, N supervised ones, D hidden width, V vocabulary.

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from bench import timing
from bench.cases import LinearCase
from bench.floors import product_floor
from bench.linear import loss_of, release
from bench.memory import cuda_peak
from bench.peers import Cotbal, Eager
from bench.peers.base import Peer
from bench.peers.cotbal import ALL_ROWS
from bench.problems import Problem, make
from bench.timing import Variant, clock_for, describe

Put = Callable[..., None]
Run = Callable[[], Any]

# The target of the project; the second is visual instruction data, where most positions are images and prompts.
FULL, SPARSE = LinearCase("Llama-3", 8192, tasks=4), LinearCase("Llama-3", 16384, supervised=0.12, tasks=4)


def interleaved(
    candidates: Mapping[str, Run], left: Callable[[], float], device: torch.device, warmup: int = 3, rounds: int = 20
) -> dict[str, dict[str, Any]]:
    """Median, least and number of milliseconds of every candidate; one that fails says why."""
    variants = {name: Variant(lambda _, run=run: run()) for name, run in candidates.items()}  # type: ignore[misc]
    timings = timing.interleaved(variants, clock_for(device), rounds, warmup, left=left)
    found: dict[str, dict[str, Any]] = {}
    for name in candidates:
        if name in timings.samples:
            values = timings.samples[name]
            found[name] = {
                "milliseconds": 1e3 * statistics.median(values),
                "least_milliseconds": 1e3 * min(values),
                "rounds": len(values),
            }
        else:
            found[name] = {"error": timings.errors[name]}
    return found


def extra_mib(run: Run, problem: Problem) -> float | None:
    """Peak of allocated memory above what was there before, without the gradients."""
    if not problem.scores.is_cuda:
        return None
    release(problem)
    return cuda_peak(run, sum(leaf.nbytes for leaf in problem.leaves.values())) / 2**20


def host_waits(run: Run, device: torch.device) -> str:
    """Whether a run waits for the device."""
    if device.type != "cuda":
        return "not a CUDA device"
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return str(error)[:300]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def replay_of(run: Run) -> Run:
    """``run`` as a CUDA graph, captured in its first call: what is left is the device's time, without the host's."""
    captured: list[torch.cuda.CUDAGraph] = []

    def capture() -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # compiles, which a capture cannot
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        captured.append(graph)

    def replay() -> None:
        if not captured:
            capture()
        captured[0].replay()

    return replay


def _derived(found: dict[str, dict[str, Any]], flop: float, base: str) -> dict[str, dict[str, Any]]:
    reference = found[base].get("milliseconds")
    for result in found.values():
        if "milliseconds" in result:
            result["tflops"] = flop / result["milliseconds"] / 1e9
            if reference:
                result["of_products"] = result["milliseconds"] / reference
    return found


def measure_targets(
    put: Put,
    left: Callable[[], float],
    backends: list[str],
    device: torch.device,
    full: LinearCase = FULL,
    sparse: LinearCase = SPARSE,
) -> None:
    """Every figure that the project has a target for; ``put`` stores each as soon as it exists.

    Raises:
        RuntimeError: one of them has made the device unusable for this process.
    """

    def store(case: LinearCase, found: dict[str, dict[str, Any]]) -> None:
        for name, result in found.items():  # beside what was stored of other backends
            put("targets", case.label, name, result)

    def measure(case: LinearCase, candidates: Mapping[str, Run], rounds: int = 20) -> dict[str, dict[str, Any]]:
        base, *_ = candidates
        found: dict[str, dict[str, Any]] = {}
        # Each alone first, which compiles it: one that never ends takes nobody else's figures with it.
        for name, run in candidates.items():
            found |= interleaved({name: run}, left, device, warmup=1, rounds=3)
            store(case, _derived(found, case.flops, base))
        found = _derived(interleaved(candidates, left, device, rounds=rounds), case.flops, base)
        store(case, found)
        return found

    problem = make(full, device)
    ours = {name: Cotbal(name, name) for name in backends}
    first = backends[0]
    peers = {
        **ours,
        f"{first}, recompute": Cotbal(first, first, recompute=True),
        # What the same kernels take without computing logits twice, at a larger workspace.
        f"{first}, all logits": Cotbal(first, first, chunk_size=ALL_ROWS),
    }
    steps = {name: _step(peer, problem) for name, peer in peers.items()}
    candidates = {"three products": _products(full, device), **steps}
    if device.type == "cuda":
        candidates[f"{first}, graph replay"] = replay_of(steps[first])
    found = measure(full, candidates)
    del candidates  # and with it the logits of the products
    for name, run in steps.items():
        found[name]["extra_mib"] = _or_error(lambda run=run: extra_mib(run, problem))  # type: ignore[misc]
        found[name]["host_waits"] = _or_error(lambda run=run: host_waits(run, device))  # type: ignore[misc]
        store(full, {name: found[name]})

    alone = replace(full, mode="loss")
    with torch.no_grad():
        candidates = {"one product": _products(alone, device)}
        candidates |= {name: (lambda peer=peer: loss_of(peer, problem)) for name, peer in ours.items()}  # type: ignore[misc]
        measure(alone, candidates)
    del candidates, steps, problem

    problem = make(sparse, device)
    candidates = {"three products of the supervised rows": _products(sparse, device)}
    for name, peer in ours.items():
        candidates[name] = _step(peer, problem)
        # The bound is known from the labels before they go to the device.
        candidates[f"{name}, max_tokens"] = _step(Cotbal(name, name, max_tokens=sparse.N), problem)
    candidates["dense PyTorch"] = _step(Eager(), problem)
    found = measure(sparse, candidates, rounds=10)
    for name in [*backends, "dense PyTorch"]:
        found[name]["extra_mib"] = _or_error(lambda name=name: extra_mib(candidates[name], problem))  # type: ignore[misc]
        store(sparse, {name: found[name]})


def _products(case: LinearCase, device: torch.device) -> Run:
    floor = product_floor(case, device)
    assert floor is not None  # only a backward pass alone has none
    return lambda: floor.run(None)


def _step(peer: Peer, problem: Problem) -> Run:
    """Loss and gradients, which are returned: a captured step has no ``grad`` of the one before to add to."""
    return lambda: torch.autograd.grad(loss_of(peer, problem), [*problem.leaves.values()])


def _or_error(run: Run) -> Any:
    try:
        return run()
    except Exception as error:
        timing.require_device()
        return describe(error)
