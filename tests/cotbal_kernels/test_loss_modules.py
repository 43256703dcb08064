"""The nn.Module forms: the functions' values, and task weights that stay float32."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_problems import make_problem
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cotbal_kernels import (
    LinearTaskCrossEntropy,
    TaskCrossEntropy,
    linear_task_cross_entropy,
    modules,
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


class Calls(TorchDispatchMode):
    """The loss ops in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "task_ce" in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_recompute() -> None:
    """The gradients of the function, from the ops of the function: nothing waits between the passes."""
    lam = make_problem().task_weights.detach()

    def step(loss: Callable[..., Any], *more: Tensor, **options: Any) -> tuple[list[Tensor], list[str]]:
        p = make_problem()
        with Calls() as calls:
            out = loss(*p.tensors[:4], *more, bias=p.bias, **options)
            out.loss.backward()
        return [out.loss, p.hidden.grad, p.weight.grad, p.bias.grad], calls.names

    found, calls = step(LinearTaskCrossEntropy(lam, recompute=True))
    wanted, wanted_calls = step(linear_task_cross_entropy, lam, recompute=True)
    assert calls == wanted_calls
    assert calls != step(LinearTaskCrossEntropy(lam))[1]
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_gradient_buffer() -> None:
    buffers = []
    lam = make_problem().task_weights.detach()
    for loss, more in ((LinearTaskCrossEntropy(lam), ()), (linear_task_cross_entropy, (lam,))):
        p = make_problem()
        buffers.append(torch.ones_like(p.weight).detach())
        loss(*p.tensors[:4], *more, grad_weight_out=buffers[-1]).loss.backward()
        assert p.weight.grad is None
    assert torch.equal(*buffers)
    assert not torch.equal(buffers[0], torch.ones_like(buffers[0]))


def test_bound_of_the_computed_positions() -> None:
    p = make_problem()
    module = LinearTaskCrossEntropy(p.task_weights.detach())
    supervised = int((p.labels != -100).sum())
    out = module(*p.tensors[:4], max_tokens=supervised)
    assert torch.equal(out.loss, linear_task_cross_entropy(*p.tensors, max_tokens=supervised).loss)
    with pytest.raises(ValueError, match="max_tokens"):
        module(*p.tensors[:4], max_tokens=supervised - 1)


@pytest.mark.parametrize(
    ("kind", "function"),
    [(LinearTaskCrossEntropy, linear_task_cross_entropy), (TaskCrossEntropy, task_cross_entropy)],
)
def test_modules_have_every_argument(monkeypatch: pytest.MonkeyPatch, kind: type, function: Callable[..., Any]) -> None:
    """And hand all of them on."""
    module = kind(torch.ones(2))
    found = {**module.options, **inspect.signature(module.forward).parameters, "task_weights": None}
    arguments = inspect.signature(function).parameters
    assert found.keys() == arguments.keys()
    assert {name: arguments[name].default for name in module.options} == module.options
    bind = inspect.signature(function).bind
    monkeypatch.setattr(modules, function.__name__, lambda *args, **kwargs: bind(*args, **kwargs).arguments)
    given = {name: object() for name in inspect.signature(module.forward).parameters}
    assert module(**given) == {**given, **module.options, "task_weights": module.task_weights}


def test_task_weights_that_learn_are_refused() -> None:
    for kind in (LinearTaskCrossEntropy, TaskCrossEntropy):
        with pytest.raises(ValueError, match=r"task_weights must not require grad: .* Call linear_task_cross_entropy"):
            kind(torch.ones(2, requires_grad=True))


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
    assert getattr(model, cast)()["loss"].task_weights.dtype == torch.float32
    assert model.to_empty(device="cpu")["loss"].task_weights.dtype == torch.float32


def test_state_dict() -> None:
    lam = torch.tensor([2.01, 1.0])
    state = LinearTaskCrossEntropy(lam).state_dict()
    assert list(state) == ["task_weights"]
    other = LinearTaskCrossEntropy(torch.ones(2))
    other.load_state_dict(state)
    assert torch.equal(other.task_weights, lam)
    own = LinearTaskCrossEntropy(lam)
    own.load_state_dict({"task_weights": torch.ones(2)})
    assert not torch.equal(own.task_weights, lam)  # a copy: the caller's stays what it is


def test_bad_options_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="aggregation must be one of"):
        TaskCrossEntropy(torch.ones(2), aggregation="mean")
    with pytest.raises(ValueError, match="logit_scale must be a finite number > 0, got -1"):
        TaskCrossEntropy(torch.ones(2), logit_scale=-1)
    with pytest.raises(ValueError, match="task_weights must be float32"):
        TaskCrossEntropy(torch.ones(2).half())
