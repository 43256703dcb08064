import pytest
import torch
from loss_problems import Problem, make_problem

torch.set_num_threads(2)


@pytest.fixture
def problem() -> Problem:
    return make_problem()
