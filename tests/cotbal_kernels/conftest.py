import os

import pytest
import torch
from loss_problems import Problem, make_problem

# One test at a time has two cores; several (pytest -n) have one each.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture
def problem() -> Problem:
    return make_problem()
