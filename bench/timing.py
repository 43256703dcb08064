"""Times of variants that take turns, so that a drifting clock meets all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from bench import turns


@dataclass
class Variant:
    """``run`` is timed; ``prepare``, before each run, is not, and what it returns goes to ``run``."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


class Clock(Protocol):
    """Seconds that a call takes."""

    def time(self, run: Callable[[], Any]) -> float: ...

    def retries(self) -> int:
        """How often memory had to be freed and asked for again, so far."""
        ...


class HostClock:
    """Wall time of the process."""

    def time(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def retries(self) -> int:
        return 0


class CudaClock:
    """CUDA events around the call. The device is idle before, so launch overhead counts where it is not hidden."""

    def __init__(self) -> None:
        self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, run: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        self.start.record()
        run()
        self.stop.record()
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop) / 1e3

    def retries(self) -> int:
        return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))


def clock_for(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Timings:
    """Seconds of every round of each variant, from the first round on: samples at the same place are of one round."""

    samples: dict[str, list[float]]
    errors: dict[str, str]
    # Of each variant, how many samples hold time in which the allocator freed memory and asked for it again.
    retried: dict[str, int] = field(default_factory=dict)


def interleaved(
    variants: Mapping[str, Variant],
    clock: Clock,
    rounds: int,
    warmup: int,
    seconds: float = math.inf,
    left: Callable[[], float] = lambda: math.inf,
    least: int = 3,
) -> Timings:
    """Take turns: each round runs every variant once, beginning one further along than the round before.

    A variant that raises is taken out and its error kept, unless the device is lost with it. One that has used its
    ``seconds``, preparation included, takes no further rounds, and none does when no time is ``left``, but everybody
    takes the first ``least``: slow ones are measured less often, never alone.

    Where a run finds the memory full of what others left behind, the allocator frees it and asks again, in the middle
    of what is timed. Such a sample is taken once more, right after, when the memory is of the right sizes; if the
    second is like the first it is the variant's own, and counted.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    errors: dict[str, str] = {}
    spent = dict.fromkeys(variants, 0.0)
    retried: dict[str, int] = {}
    active = list(variants)
    for number in range(-warmup, rounds):
        if number >= least:
            active = [name for name in active if spent[name] <= seconds and left() > 0]
        for name in rotated(active, number):
            variant = variants[name]
            turns.take(name)
            started = time.perf_counter()
            try:
                duration, disturbed = _sample(variant, clock)
                if disturbed:
                    duration, disturbed = _sample(variant, clock)
            except Exception as error:
                require_device()
                errors[name] = describe(error)
                continue
            if number >= 0:
                samples[name].append(duration)
                spent[name] += time.perf_counter() - started
                if disturbed:
                    retried[name] = retried.get(name, 0) + 1
        active = [name for name in active if name not in errors]
    return Timings({name: values for name, values in samples.items() if values and name not in errors}, errors, retried)


def _sample(variant: Variant, clock: Clock) -> tuple[float, bool]:
    """Seconds of one run, and whether the allocator had to free memory and ask for it again in them."""
    prepared = variant.prepare()
    before = clock.retries()
    duration = clock.time(lambda: variant.run(prepared))
    return duration, clock.retries() > before


def require_device() -> None:
    """Raise where an error has made the device unusable for this process: whoever comes next would be blamed for it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def rotated(names: Sequence[str], by: int) -> list[str]:
    """``names`` from position ``by`` on, then the rest."""
    if not names:
        return []
    by %= len(names)
    return [*names[by:], *names[:by]]


def describe(error: BaseException) -> str:
    """Kind and first line of an error, for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles by linear interpolation between the sorted values, as numpy's default."""
        if not values:
            raise ValueError("there is nothing to take the median of")
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def paired_ratio(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """Ratios within each round that both took part in, under the same conditions: the first ones of either."""
    return Spread.of([value / other for value, other in zip(values, reference, strict=False)])
