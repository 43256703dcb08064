"""Statistics and the order of turns, with a clock whose readings are known."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bench.timing import CudaClock, Spread, Variant, describe, interleaved, paired_ratio, rotated


class ScriptedClock:
    """Every call takes as long as it returns."""

    def time(self, run: Callable[[], Any]) -> float:
        return float(run())

    def retries(self) -> int:
        return 0


def scripted(values: list[float], log: list[str], name: str) -> Variant:
    readings = iter(values)

    def run(_: object) -> float:
        log.append(name)
        return next(readings)

    return Variant(run)


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0], [9.0, 2.0, 7.0, 4.0, 4.5, 0.5, 8.0]])
def test_spread_is_median_and_quartiles(values: list[float]) -> None:
    found = Spread.of(values)
    expected = np.percentile(values, [25, 50, 75])
    assert [found.low, found.median, found.high] == pytest.approx(expected.tolist(), rel=1e-15)


def test_spread_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to take the median of"):
        Spread.of([])


def test_ratio_is_taken_within_rounds() -> None:
    """The clock doubles from round to round: the ratio of each round is 3 all the same, that of the medians too, but
    one disturbed round moves only itself."""
    reference = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert paired_ratio([3 * value for value in reference], reference) == Spread(3.0, 3.0, 3.0)
    disturbed = [3.0, 6.0, 100.0, 24.0, 48.0]
    assert paired_ratio(disturbed, reference).median == 3.0
    # Whoever left earlier has its last samples compared with those of its own rounds.
    assert paired_ratio([3.0, 6.0], reference) == paired_ratio([3.0, 6.0, 12.0], [1.0, 2.0]) == Spread(3.0, 3.0, 3.0)


def test_variants_take_turns_and_each_begins_once() -> None:
    log: list[str] = []
    variants = {name: scripted([9.0, 1.0 + k, 2.0 + k, 3.0 + k], log, name) for k, name in enumerate("abc")}
    found = interleaved(variants, ScriptedClock(), rounds=3, warmup=1, seconds=60.0)
    assert "".join(log) == "cab" + "abc" + "bca" + "cab"
    assert found.samples == {"a": [1.0, 2.0, 3.0], "b": [2.0, 3.0, 4.0], "c": [3.0, 4.0, 5.0]}
    assert found.errors == {}


def test_preparation_is_not_timed_and_feeds_the_run() -> None:
    prepared = iter([10.0, 20.0, 30.0])
    variant = Variant(lambda value: value / 10, lambda: next(prepared))
    assert interleaved({"a": variant}, ScriptedClock(), 3, 0, 60.0).samples == {"a": [1.0, 2.0, 3.0]}


def test_a_variant_that_raises_is_named_and_the_others_go_on() -> None:
    calls = 0

    def failing(_: object) -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of luck\nsecond line")
        return 1.0

    variants = {"bad": Variant(failing), "good": Variant(lambda _: 2.0)}
    found = interleaved(variants, ScriptedClock(), rounds=4, warmup=0, seconds=60.0)
    assert found.errors == {"bad": "RuntimeError: out of luck"}
    assert found.samples == {"good": [2.0] * 4}  # half a comparison is none: its sample is gone
    assert calls == 2


class FullMemoryClock(ScriptedClock):
    """A reading of 100 and more is one in which the allocator had to free memory first."""

    found = 0

    def time(self, run: Callable[[], Any]) -> float:
        value = super().time(run)
        self.found += value >= 100
        return value

    def retries(self) -> int:
        return self.found


def test_a_sample_with_an_allocator_that_had_to_free_is_taken_again_in_the_same_round() -> None:
    """Once: if it happens again it is the variant's own, kept and counted. What preparation frees disturbs nobody."""
    log: list[str] = []
    clock = FullMemoryClock()

    def preparing() -> None:
        clock.found += 1

    variants = {
        "a": scripted([1.0, 100.0, 2.0, 3.0], log, "a"),
        "b": scripted([100.0, 101.0, 5.0, 102.0, 103.0], log, "b"),
        "c": Variant(lambda _: 7.0, preparing),
    }
    found = interleaved(variants, clock, rounds=3, warmup=0, seconds=60.0)
    assert found.samples == {"a": [1.0, 2.0, 3.0], "b": [101.0, 5.0, 103.0], "c": [7.0] * 3}
    assert found.retried == {"b": 2}
    assert found.errors == {}
    assert "".join(log) == "abb" + "baa" + "abb"
    # In a warm-up round too, and such a sample is not counted.
    warm = interleaved({"b": scripted([100.0, 101.0, 5.0], log, "b")}, clock, rounds=1, warmup=1, seconds=60.0)
    assert (warm.samples, warm.retried) == ({"b": [5.0]}, {})


def test_retries_of_a_device_are_those_of_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": 4, "num_ooms": 0})
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: None)
    assert CudaClock().retries() == 4
    monkeypatch.setattr(torch.cuda, "memory_stats", dict)  # as it is before the first allocation
    assert CudaClock().retries() == 0


def test_a_variant_leaves_when_its_time_is_over_but_not_before_three_rounds() -> None:
    """Its own time alone counts: fast ones go on, and time that preparation takes is time."""
    slow = Variant(lambda _: 1.0, lambda: time.sleep(0.02))
    variants = {"slow": slow, "fast": Variant(lambda _: 2.0), "failing": scripted([3.0] * 4, [], "failing")}
    found = interleaved(variants, ScriptedClock(), rounds=6, warmup=0, seconds=0.015)
    assert found.samples == {"slow": [1.0] * 3, "fast": [2.0] * 6}
    assert found.errors == {"failing": "StopIteration"}
    all_slow = interleaved({"a": slow, "b": slow}, ScriptedClock(), rounds=50, warmup=1, seconds=-1.0)
    assert all_slow.samples == {"a": [1.0] * 3, "b": [1.0] * 3}  # and nobody is left waiting for


def test_rotation_and_description() -> None:
    assert rotated(["a", "b", "c"], -1) == ["c", "a", "b"]
    assert rotated([], 3) == []
    assert describe(KeyError()) == "KeyError"
