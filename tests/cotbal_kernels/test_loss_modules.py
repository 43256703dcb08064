"""The nn.Module forms: the functions' values, and task weights that stay float32."""

import pytest
import torch
from loss_problems import make_problem
from torch import nn

from cotbal_kernels import (
    LinearTaskCrossEntropy,
    TaskCrossEntropy,
    linear_task_cross_entropy,
    task_cross_entropy,
)


def test_modules_equal_functions() -> None:
    p = make_problem()
    lam = p.task_weights.detach()
    options = {"shift": True, "aggregation": "task", "label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 0.5}
    module = LinearTaskCrossEntropy(lam, **options)
    out = module(p.hidden, p.weight, p.labels, p.task_ids, bias=p.bias)
    wanted = linear_task_cross_entropy(*p.tensors[:4], lam, bias=p.bias, **options)
    assert torch.equal(out.loss, wanted.loss)
    logits = p.hidden @ p.weight.t()
    out = TaskCrossEntropy(lam)(logits, p.labels, p.task_ids, normalizer=7.0)
    assert torch.equal(out.loss, task_cross_entropy(logits, p.labels, p.task_ids, lam, normalizer=7.0).loss)
    assert "num_tasks=4" in repr(module)
    assert "aggregation='task'" in repr(module)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_task_weights_stay_float32(cast: str) -> None:
    """2.01 in bf16 would be 2.016."""
    lam = torch.tensor([2.01, 1.0, 0.3])
    model = nn.ModuleDict({"head": nn.Linear(2, 3), "loss": LinearTaskCrossEntropy(lam)})
    getattr(model, cast)()
    assert model["head"].weight.dtype == getattr(torch, cast)
    assert torch.equal(model["loss"].task_weights, lam)
    assert model.to(torch.bfloat16)["loss"].task_weights.dtype == torch.float32
    assert model.to("meta")["loss"].task_weights.device.type == "meta"
    assert model.to_empty(device="cpu")["loss"].task_weights.dtype == torch.float32


def test_state_dict() -> None:
    lam = torch.tensor([2.01, 1.0])
    state = LinearTaskCrossEntropy(lam).state_dict()
    assert list(state) == ["task_weights"]
    other = LinearTaskCrossEntropy(torch.ones(2))
    other.load_state_dict(state)
    assert torch.equal(other.task_weights, lam)


def test_bad_options_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="aggregation must be one of"):
        TaskCrossEntropy(torch.ones(2), aggregation="mean")
    with pytest.raises(ValueError, match="logit_scale must be a finite number > 0, got -1"):
        TaskCrossEntropy(torch.ones(2), logit_scale=-1)
    with pytest.raises(ValueError, match="task_weights must be float32"):
        TaskCrossEntropy(torch.ones(2).half())
