"""Durations and sizes as people read them: the unit that fits, and nothing rounded up to sixty of anything."""

from __future__ import annotations

import pytest

from trainer.units import byte_size, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (1e-9, "<0.1 s"), (0.04, "<0.1 s"), (0.06, "0.1 s"), (9.94, "9.9 s"), (9.96, "10 s"),
        (59.6, "1 min 00 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h 00 min"), (7199, "1 h 59 min"),
        (7199.6, "2 h 00 min"), (4_699_800, "1,305 h 30 min"),
    ],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"), (999, "999 bytes"), (1000, "0.98 KiB"), (586 * 2**10, "586 KiB"), (1023.9 * 2**10, "1.00 MiB"),
        (13.15 * 2**30, "13.2 GiB"), (9.996 * 2**30, "10.0 GiB"), (2.5 * 2**40, "2.50 TiB"), (2**60, "1,048,576 TiB"),
    ],
)  # fmt: skip
def test_byte_size(count: float, text: str) -> None:
    assert byte_size(count) == text
