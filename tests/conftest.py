"""Threads, order and temporary files of the whole suite."""

import os
import tempfile
from collections.abc import Iterator

# Test processes share the cores: threads of one that wait spinning for those of another cost more than they compute.
# Before torch is imported, and for the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

import pytest


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a test or a process of it leaves behind when it is killed goes with the folders of pytest."""
    folder = str(tmp_path_factory.mktemp("t", numbered=False))  # short: sockets are made in it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        patch.setenv("TMPDIR", folder)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with whole trainings come first: at the end one of them would run while the other processes wait."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
