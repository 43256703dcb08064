"""What the portable backend costs: products of rows that count, no gradient that nobody wants, a bounded workspace."""

from types import SimpleNamespace

import pytest
import torch
from loss_problems import FP32, Problem, error, make_problem
from torch.utils.flop_counter import FlopCounterMode

from cotbal_kernels import backends, linear_task_cross_entropy, portable
from cotbal_kernels.interface import LinearProblem, TokenLoss
from cotbal_kernels.reference import reference_linear_task_cross_entropy


@pytest.fixture
def counted_flops():
    """A backend that is the portable one and counts the flop of its matrix products."""

    def addmm_flop(total, left, right, **_) -> int:  # the mode does not know the in-place form
        return 2 * left[0] * left[1] * right[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop})
    total = 0

    def counting(function):
        def wrapper(*args, **kwargs):
            nonlocal total
            with counter:  # starts again at 0
                result = function(*args, **kwargs)
            total += counter.get_total_flops()
            return result

        return wrapper

    names = [name for name in dir(backends.Backend) if not name.startswith("_")]
    backends.register_backend(
        "counting", SimpleNamespace(**{name: counting(getattr(portable, name)) for name in names})
    )

    def count(run) -> int:
        before = total
        run()
        return total - before

    yield count
    del backends.BACKENDS["counting"]


def flops_of(counted_flops, p: Problem, backward: bool, **kwargs) -> float:
    """Products in units of F = 2 * N * V * D with N supervised rows."""
    supervised = int((p.labels != -100).sum())

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = linear_task_cross_entropy(*p.tensors, backend="counting", **kwargs)
        if backward:
            out.loss.sum().backward()

    return counted_flops(run) / (2 * supervised * p.weight.numel())


@pytest.mark.parametrize(
    ("frozen", "kwargs", "backward", "expected"),
    [
        ((), {}, True, 3),  # gradients in forward
        ((), {}, False, 1),  # loss only
        (("weight",), {}, True, 2),  # frozen head
        (("hidden",), {}, True, 2),  # frozen trunk
        (("weight", "hidden"), {}, True, 1),
        ((), {"aggregation": "none"}, True, 4),  # recomputed
        ((), {"recompute": True}, True, 4),
        (("weight",), {"aggregation": "none"}, True, 3),
    ],
)
def test_cost(counted_flops, frozen, kwargs, backward, expected) -> None:
    """In products over supervised rows only: half the positions are ignored and cost nothing."""
    p = make_problem((4, 50), ignored=0.5)
    for name in frozen:
        getattr(p, name).requires_grad_(False)
    assert flops_of(counted_flops, p, backward, chunk_size=13, **kwargs) == expected


def test_weight_zero_costs_nothing(counted_flops) -> None:
    p = make_problem((4, 50), ignored=0.0)
    p.task_weights.requires_grad_(False)
    p.task_weights[1] = 0
    share = float((p.task_ids != 1).sum()) / p.labels.numel()
    assert flops_of(counted_flops, p, True) == pytest.approx(3 * share)
    p.task_weights[:] = 0
    assert flops_of(counted_flops, p, True) == 0


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_frozen_side_has_no_gradient_buffer(frozen: str) -> None:
    p = make_problem()
    need = [frozen != "hidden", frozen != "weight", False]
    lam = p.task_weights.detach()
    targets = portable.prepare_targets(p.labels.flatten(), p.task_ids.flatten(), lam, 67, -100, True, False, 51)
    where = (targets.targets_M, targets.rows_N, targets.num_rows)
    problem = LinearProblem(p.hidden.detach().flatten(0, 1), p.weight.detach(), None, *where)
    out = portable.linear_forward(problem, targets.tasks_M, lam, need, TokenLoss(), 0)
    sizes = (out.grad_hidden_MD.numel(), out.grad_weight_VD.numel(), out.grad_bias_V.numel())
    full = (p.hidden.numel(), p.weight.numel(), p.bias.numel())
    assert sizes == tuple(n if wanted else 0 for n, wanted in zip(full, need, strict=True))


def test_workspace_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor beyond inputs, gradients and the workspace: M x V would be 40 times larger."""
    monkeypatch.setattr(portable, "WORKSPACE_BYTES", 64 * 500)
    p = make_problem((1, 400), D=8, V=500, ignored=0.0)
    expected = reference_linear_task_cross_entropy(*p.tensors)
    largest = 0
    original = portable._softmax_in_blocks

    def spy(logits, *args, **kwargs):
        nonlocal largest
        largest = max(largest, logits.numel() * 4)
        original(logits, *args, **kwargs)

    monkeypatch.setattr(portable, "_softmax_in_blocks", spy)
    out = linear_task_cross_entropy(*p.tensors)
    assert error(out.loss, expected.loss) <= FP32
    assert error(torch.autograd.grad(out.loss, p.weight)[0], torch.autograd.grad(expected.loss, p.weight)[0]) <= FP32
    assert 0 < largest <= portable.WORKSPACE_BYTES
