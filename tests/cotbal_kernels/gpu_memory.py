"""Tests that need much of a GPU's memory take turns, however many processes run tests (``pytest -n``)."""

import fcntl
import gc
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Nobody else is behind the same ``lock`` meanwhile, and what this process's allocator keeps goes back after it."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _give_back()
        try:
            yield
        finally:
            _give_back()


def _give_back() -> None:
    # pytest keeps the traceback of a test that failed, and with it the test's tensors, until the next test.
    traceback.clear_frames(getattr(sys, "last_traceback", None))
    gc.collect()
    torch.cuda.empty_cache()


def require_memory(gibibytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory, {free:.1f} GiB are free")
