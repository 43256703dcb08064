"""An illegal access makes a GPU useless for its process: hooks of pytest that blame one test for it, not all behind."""

from collections.abc import Iterator

import pytest
import torch

LOST_DEVICE = 75  # exit status, by which bench/gpu_tests.py knows that the tests that are left want another process


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """What a test has launched fails in that test."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def pytest_runtest_logfinish() -> None:
    """End the process where no test behind this one could pass."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the device is lost: {error}", returncode=LOST_DEVICE)
