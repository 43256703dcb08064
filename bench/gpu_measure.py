"""The fused loss beside its own library products and beside dense PyTorch, interleaved in one run.

A round runs every candidate once, so clocks and temperature are the same for all; medians over the rounds. Products
are those the loss cannot do without: 3 of 2 N V D flop for loss and gradients, 1 for the loss.
"""

# Shapes: M positions, N supervised ones, D hidden width, V vocabulary.

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cotbal_kernels import linear_task_cross_entropy

Put = Callable[..., None]
Run = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    M: int
    D: int
    V: int
    supervised: float = 1.0

    def __str__(self) -> str:
        return f"M{self.M}-V{self.V}-D{self.D}-{self.supervised:.0%}"


# The target of the project; the second is visual instruction data, where most positions are images and prompts.
FULL, SPARSE = Sizes(8192, 4096, 128_256), Sizes(16384, 4096, 128_256, 0.12)


@dataclass(frozen=True)
class Problem:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    tasks: Tensor
    lam: Tensor
    sizes: Sizes

    @classmethod
    def random(cls, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
        generator = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(sizes.M, sizes.D, device=device, generator=generator, dtype=dtype)
        weight = torch.randn(sizes.V, sizes.D, device=device, generator=generator, dtype=dtype) / sizes.D**0.5
        labels = torch.randint(sizes.V, (sizes.M,), device=device, generator=generator)
        labels[torch.rand(sizes.M, device=device, generator=generator) >= sizes.supervised] = -100
        tasks = torch.arange(sizes.M, device=device) % 4
        lam = torch.tensor([0.5, 1.0, 1.5, 2.0], device=device)
        return cls(hidden.requires_grad_(), weight.requires_grad_(), labels, tasks, lam, sizes)

    @property
    def count(self) -> int:
        return int((self.labels >= 0).sum())

    def fused(self, backend: str, **options: Any) -> Tensor:
        arguments = (self.hidden, self.weight, self.labels, self.tasks, self.lam)
        return linear_task_cross_entropy(*arguments, backend=backend, **options).loss

    def dense(self) -> Tensor:
        """Eq. 2 with the logits in memory."""
        rows = F.cross_entropy(F.linear(self.hidden, self.weight).float(), self.labels, reduction="none")
        scale = self.lam[self.tasks] * (self.labels != -100)
        return (scale * rows).sum() / scale.sum()

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))


def library_products(p: Problem, count: int, how_many: int) -> Run:
    """The first, or all three, products over ``count`` rows, by the library behind ``torch.mm``."""
    hidden, weight = p.hidden.detach()[:count], p.weight.detach()
    logits = hidden.new_empty((count, weight.shape[0]))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight) if how_many == 3 else None

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        if grad_weight is not None:
            torch.mm(logits, weight, out=grad_hidden)
            torch.mm(logits.t(), hidden, out=grad_weight)

    return run


def _seconds(run: Run, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def interleaved(
    candidates: Mapping[str, Run], left: Callable[[], float], device: torch.device, warmup: int = 3, rounds: int = 20
) -> dict[str, dict[str, Any]]:
    """Median, least and number of seconds of every candidate; one that fails says why and leaves the round."""
    found: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, run in candidates.items():
            if name in found or (left() <= 0 and len(times[name]) >= 3):
                continue
            try:
                seconds = _seconds(run, device)
            except Exception as error:
                found[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
                continue
            if turn >= warmup:
                times[name].append(seconds)
    for name, values in times.items():
        if name not in found and values:
            found[name] = {
                "milliseconds": 1e3 * statistics.median(values),
                "least_milliseconds": 1e3 * min(values),
                "rounds": len(values),
            }
    return found


def extra_mib(run: Run, outputs: int, device: torch.device) -> float | None:
    """Peak of allocated memory above what was there before and ``outputs`` bytes."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return float((torch.cuda.max_memory_allocated() - before - outputs) / 2**20)


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


def _derived(found: dict[str, dict[str, Any]], flop: Mapping[str, float], base: str) -> dict[str, dict[str, Any]]:
    reference = found.get(base, {}).get("milliseconds")
    for name, result in found.items():
        if "milliseconds" in result:
            result["tflops"] = flop[name] / result["milliseconds"] / 1e9
            if reference:
                result["of_products"] = result["milliseconds"] / reference
    return found


def measure_targets(
    put: Put,
    left: Callable[[], float],
    names: list[str],
    device: torch.device,
    full: Sizes = FULL,
    sparse: Sizes = SPARSE,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Every figure that the project has a target for; ``put`` stores each as soon as it exists."""
    p = Problem.random(full, device, dtype)
    one = 2.0 * full.M * full.V * full.D
    first = names[0]
    steps: dict[str, Run] = {name: _step(p, name) for name in names}
    steps[f"{first}, recompute"] = _step(p, first, recompute=True)
    # What the same kernels take without computing logits twice, at a larger workspace.
    steps[f"{first}, all logits"] = _step(p, first, chunk_size=full.M)
    candidates = {"three products": library_products(p, full.M, 3), **steps}
    if device.type == "cuda":
        candidates[f"{first}, graph replay"] = replay_of(_step(p, first))
    found = interleaved(candidates, left, device)
    found = _derived(found, dict.fromkeys(candidates, 3 * one), "three products")
    put("targets", f"loss and gradients {full}", found)
    del candidates  # and with it the logits of the products
    for name, run in steps.items():
        found.setdefault(name, {})["extra_mib"] = _or_error(lambda run=run: extra_mib(run, outputs_of(p), device))  # type: ignore[misc]
        found[name]["host_waits"] = _or_error(lambda run=run: host_waits(run, device))  # type: ignore[misc]
        put("targets", f"loss and gradients {full}", found)

    with torch.no_grad():
        candidates = {"one product": library_products(p, full.M, 1)}
        candidates |= {name: (lambda name=name: p.fused(name)) for name in names}  # type: ignore[misc]
        found = _derived(interleaved(candidates, left, device), dict.fromkeys(candidates, one), "one product")
    put("targets", f"loss alone {full}", found)
    del candidates, steps, p

    p = Problem.random(sparse, device, dtype)
    count = p.count  # known from the labels before they went to the device
    candidates = {"three products of the supervised rows": library_products(p, count, 3)}
    for name in names:
        candidates[name] = _step(p, name)
        candidates[f"{name}, max_tokens"] = _step(p, name, max_tokens=count)
    candidates["dense PyTorch"] = lambda: p.gradients(p.dense())
    found = interleaved(candidates, left, device, rounds=10)
    flop = dict.fromkeys(candidates, 3 * 2.0 * count * sparse.V * sparse.D)
    put("targets", f"loss and gradients {sparse}", _derived(found, flop, "three products of the supervised rows"))
    for name in [*names, "dense PyTorch"]:
        found.setdefault(name, {})["extra_mib"] = _or_error(
            lambda name=name: extra_mib(candidates[name], outputs_of(p), device)  # type: ignore[misc]
        )
        put("targets", f"loss and gradients {sparse}", found)


def outputs_of(p: Problem) -> int:
    """Bytes of the two gradients."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (p.hidden, p.weight))


def _step(p: Problem, backend: str, **options: Any) -> Run:
    return lambda: p.gradients(p.fused(backend, **options))


def _or_error(run: Run) -> Any:
    try:
        return run()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
