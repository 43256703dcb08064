import os
from collections.abc import Callable, Iterator

import pytest
import torch
from gpu_device import pytest_runtest_call, pytest_runtest_logfinish  # noqa: F401 (hooks)
from gpu_memory import alone, require_memory
from loss_problems import Problem, make_problem

# One test at a time has two cores; several (pytest -n) have one each.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture
def problem() -> Problem:
    return make_problem()


@pytest.fixture
def big_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[float], None]]:
    """Skips where fewer GiB of the GPU are free than it is called with; whoever has this fixture runs alone with it."""
    # Each process of pytest -n has a folder of its own, in one that they share.
    with alone(tmp_path_factory.getbasetemp().parent / "big_memory.lock"):
        yield require_memory
