"""From what was timed to what is written down, the same for every suite."""

from __future__ import annotations

from bench.peers import OURS
from bench.results import FAILED, Entry
from bench.timing import Spread, Timings, paired_ratio


def record(entry: Entry, timings: Timings, tokens: int | None = None) -> None:
    """Put times and ratios of a timed variant into its entry; an error in the rounds makes it a failure."""
    if entry.name not in timings.samples:
        entry.status, entry.seconds = FAILED, None
        entry.error = timings.errors.get(entry.name, "was not timed")
        return
    samples = timings.samples[entry.name]
    spread = Spread.of(samples)
    entry.seconds, entry.samples = as_list(spread), [float(f"{sample:.5g}") for sample in samples]
    entry.retried = timings.retried.get(entry.name, 0)
    if OURS in timings.samples:
        entry.ratio = as_list(paired_ratio(samples, timings.samples[OURS]))
    if tokens:
        entry.tokens_per_second = tokens / spread.median


def as_list(spread: Spread) -> list[float]:
    return [float(f"{value:.5g}") for value in (spread.low, spread.median, spread.high)]
