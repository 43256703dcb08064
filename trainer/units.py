"""Durations and sizes in the units that people read."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """``0.4 s``, ``35 s``, ``5 min 20 s`` or ``31 h 05 min``."""
    if 0 < seconds < 0.05:
        return "<0.1 s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def byte_size(count: float) -> str:
    """Bytes with three digits, as ``13.2 GiB``."""
    unit = "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if count < 999.5:
            break
        count, unit = count / 1024, larger
    digits = 0 if unit == "bytes" or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:,.{digits}f} {unit}"
