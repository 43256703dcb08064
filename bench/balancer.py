"""One step of the convergence balancer beside what its formulas cost on the host.

Legend: K tasks, N steps of the window, T steps so far.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.cases import BalancerCase, Preset
from bench.peers import OURS
from bench.record import record
from bench.results import FAILED, OK, UNAVAILABLE, Entry, Row
from bench.timing import Variant, clock_for, describe, interleaved, require_device
from cotbal_kernels import ConvergenceBalancer

STEPS = 20  # one sample is this many steps: a single one is too short for a clock
CHECKED = 60  # steps compared before anything is timed
# float32 weights of about 1 from float64 state: eight of their roundings.
TOLERANCE = 8 * 2.0**-24
HOST, GRAPH, PORTABLE = "numpy on the host", "cotbal (CUDA graph)", "cotbal (portable)"


class HostBalancer:
    """Eq. 2-7 of CoBa in numpy, every task present: losses are read from the device at each step."""

    def __init__(self, num_tasks: int, window: int, warmup: int, temperature: float = 5.0) -> None:
        self.num_tasks, self.warmup, self.temperature = num_tasks, warmup, temperature
        self.initial: NDArray[np.float64] | None = None
        self.ratios: deque[NDArray[np.float64]] = deque(maxlen=window)
        self.slopes: deque[NDArray[np.float64]] = deque(maxlen=window)
        self.largest: list[float] = []
        self.steps = -1

    def step(self, val_losses: Tensor) -> Tensor:
        losses_K = val_losses.double().cpu().numpy()
        if self.initial is None:
            self.initial = losses_K
        self.steps += 1
        self.ratios.append(losses_K / self.initial)
        slope_K = self._slope()
        self.slopes.append(slope_K)
        if self.steps:
            self.largest.append(float(slope_K.max()))
        weights_K = np.ones(self.num_tasks)
        if self.steps > self.warmup:
            weights_K = self.num_tasks * self._weigh(slope_K)
        return torch.from_numpy(weights_K).float().to(val_losses.device)

    def _slope(self) -> NDArray[np.float64]:
        """Least squares over the ratios of the window (Eq. 3)."""
        ratios_NK = np.array(self.ratios)
        if len(ratios_NK) < 2:
            return np.zeros(self.num_tasks)
        times_N = np.arange(len(ratios_NK)) - (len(ratios_NK) - 1) / 2
        return times_N @ (ratios_NK - ratios_NK.mean(0)) / (times_N @ times_N)

    def _weigh(self, slope_K: NDArray[np.float64]) -> NDArray[np.float64]:
        relative_K = _softmax(self.num_tasks * slope_K / np.abs(slope_K).sum())
        slopes_NK = np.array(self.slopes)
        absolute_K = _softmax(-len(slopes_NK) * slope_K / np.abs(slopes_NK).sum(0))
        largest_T = np.array(self.largest)
        count = len(largest_T)
        share = min(count * _softmax(-self.temperature * count * largest_T / np.abs(largest_T).sum())[-1], 1.0)
        return share * relative_K + (1 - share) * absolute_K


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    exponentials = np.exp(values - values.max())
    return exponentials / exponentials.sum()


def measure(case: BalancerCase, preset: Preset, device: torch.device) -> Row:
    """Check the weights of every step against the host's, then time."""
    warmup = case.window // 2
    generator = torch.Generator().manual_seed(0)
    # Losses that fall at different speeds, with noise, so that no sum of slopes is zero.
    decay_TK = torch.arange(CHECKED)[:, None] * torch.linspace(0.002, 0.02, case.tasks)
    losses_TK = (2 * torch.exp(-decay_TK) + 0.05 * torch.rand(CHECKED, case.tasks, generator=generator)).to(device)
    host = HostBalancer(case.tasks, case.window, warmup)
    expected_TK = torch.stack([host.step(row) for row in losses_TK])
    entries = {HOST: Entry(HOST, OK, version=np.__version__, seconds=[0.0] * 3)}
    variants = {HOST: _many(host, losses_TK)}
    backends = {OURS: "auto"} | ({PORTABLE: "portable"} if device.type == "cuda" else {})
    for name, backend in backends.items():
        try:
            ours = ConvergenceBalancer(case.tasks, window=case.window, warmup=warmup, device=device, backend=backend)
            found_TK = torch.stack([ours.step(row) for row in losses_TK])
            worst = float((found_TK - expected_TK).abs().max())
            entries[name] = _judged(name, worst)
            variants[name] = _many(ours, losses_TK)
        except Exception as error:
            require_device()
            entries[name] = Entry(name, FAILED, describe(error))
    if device.type != "cuda":
        entries[GRAPH] = Entry(GRAPH, UNAVAILABLE, "runs on CUDA devices only")
    elif entries[OURS].status == OK:
        try:
            variants[GRAPH] = _graph(case, warmup, losses_TK[-1])
            entries[GRAPH] = _judged(GRAPH, 0.0)
        except Exception as error:
            require_device()
            entries[GRAPH] = Entry(GRAPH, FAILED, describe(error))
    timed = {name: variant for name, variant in variants.items() if entries[name].status == OK}
    timings = interleaved(timed, clock_for(device), preset.rounds, preset.warmup, preset.seconds_per_variant)
    per_step = {name: [value / STEPS for value in values] for name, values in timings.samples.items()}
    for name in timed:
        record(entries[name], replace(timings, samples=per_step))
    return Row(suite=case.suite, label=case.label, case=asdict(case), entries=list(entries.values()))


def _judged(name: str, worst: float) -> Entry:
    measured: dict[str, Any] = {"deviations": {"weights": worst}, "allowed": {"weights": TOLERANCE}}
    if not worst <= TOLERANCE:
        return Entry(name, FAILED, f"weights are off by {worst:.1e} (at most {TOLERANCE:.1e})", **measured)
    return Entry(name, OK, seconds=[0.0] * 3, **measured)


def _many(balancer: HostBalancer | ConvergenceBalancer, losses_TK: Tensor) -> Variant:
    rows = list(losses_TK[:STEPS])

    def run(_: None) -> None:
        for losses_K in rows:
            balancer.step(losses_K)

    return Variant(run)


def _graph(case: BalancerCase, warmup: int, losses_K: Tensor) -> Variant:
    balancer = ConvergenceBalancer(case.tasks, window=case.window, warmup=warmup, device=losses_K.device)
    balancer.step(losses_K)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        balancer.step(losses_K)

    def run(_: None) -> None:
        for _step in range(STEPS):
            graph.replay()

    return Variant(run)
