"""The gradient of logits that exist, written over them."""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from cuda_on_cpu import cpu_backend, find_compiler
from loss_problems import Problem, make_problem
from torch import Tensor

from cotbal_kernels import TaskCrossEntropy, TaskLoss, backends, portable
from cotbal_kernels import task_cross_entropy as any_loss

Loss = Callable[..., TaskLoss]


@pytest.fixture(params=["portable", "portable elsewhere", "triton", "csrc"])
def loss_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loss]:
    """On a CPU and as where numbers cannot be read; in Triton's interpreter; csrc/ compiled for the host."""
    if request.param == "portable elsewhere":
        monkeypatch.setattr(portable, "on_cpu", lambda tensor: False)
    if "portable" in request.param:
        yield functools.partial(any_loss, backend="portable")
        return
    if request.param == "triton":
        pytest.importorskip("triton")
        from triton_on_cpu import INTERPRETED

        backends.register_backend("tried", INTERPRETED)  # type: ignore[arg-type]
    elif find_compiler() is None:
        pytest.skip("no C++ compiler: CXX, g++, c++")
    else:
        backends.register_backend("tried", cpu_backend())
    yield functools.partial(any_loss, backend="tried")
    del backends.BACKENDS["tried"]


def problem_of(dtype: torch.dtype, columns: int = 67) -> tuple[Problem, Tensor]:
    """Logits as a head leaves them, some of a task of weight 0 and some not supervised."""
    p = make_problem(dtype=dtype, sharpness=2.0, ignored=0.4)
    p.task_weights.requires_grad_(False)
    p.task_weights[1] = 0
    scores = torch.randn(*p.labels.shape, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    return p, scores


OPTIONS = [{}, {"aggregation": "none", "logit_softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.01}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all"])
@pytest.mark.parametrize("pad", [0, 5])
def test_the_same_bits_in_the_memory_of_the_logits(loss_of: Loss, dtype: torch.dtype, options: dict, pad: int) -> None:
    """With rows that have gaps between them too, which stay as they are."""
    p, scores = problem_of(dtype, 67 + pad)
    gradients = []
    for inplace in (False, True):
        memory = scores.clone()
        logits = memory[..., :67].requires_grad_()
        loss = loss_of(logits, p.labels, p.task_ids, p.task_weights, inplace_backward=inplace, **options).loss
        upstream = torch.linspace(-1, 2, loss.numel()).reshape(loss.shape).to(loss.dtype)
        (gradient,) = torch.autograd.grad(loss, logits, upstream)
        assert torch.equal(memory[..., 67:], scores[..., 67:])
        assert (gradient.data_ptr() == memory.data_ptr()) == inplace
        assert torch.equal(memory[..., :67], gradient if inplace else scores[..., :67])
        gradients.append(gradient.clone())
    assert torch.equal(*gradients)
    assert bool((gradients[0] == 0).all(-1).any())
    assert bool((gradients[0] != 0).any())


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_logits_without_rows_of_their_own_are_left_alone(loss_of: Loss, layout: str) -> None:
    p, _ = problem_of(torch.float32)
    M = p.labels.numel()
    memory = torch.randn(67, M) if layout == "transposed" else torch.randn(1, 67)
    logits = (memory.t() if layout == "transposed" else memory.expand(M, 67)).requires_grad_()
    before = memory.clone()
    rest = (p.labels.flatten(), p.task_ids.flatten(), p.task_weights)
    wanted, found = (
        torch.autograd.grad(loss_of(logits, *rest, inplace_backward=inplace).loss, logits)[0]
        for inplace in (False, True)
    )
    assert torch.equal(found, wanted)
    assert torch.equal(memory, before)


def test_whoever_needs_the_logits_afterwards_is_told(loss_of: Loss) -> None:
    """A second backward pass, and another loss of the same logits."""
    p, _ = problem_of(torch.float32)
    hidden = torch.randn(*p.labels.shape, 16, requires_grad=True)
    weight = torch.randn(67, 16, requires_grad=True)
    rest = (p.labels, p.task_ids, p.task_weights)
    loss = loss_of(hidden @ weight.t(), *rest, inplace_backward=True).loss
    found = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    wanted = torch.autograd.grad(loss_of(hidden @ weight.t(), *rest).loss, (hidden, weight))
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, (hidden, weight))
    logits = (hidden @ weight.t()).detach().requires_grad_()
    other = logits.square().sum()  # needs them
    torch.autograd.grad(loss_of(logits, *rest, inplace_backward=True).loss, logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other, logits)


def test_logits_kept_elsewhere_and_compiled_ones_have_the_same_gradient() -> None:
    """What a hook on saved tensors brings back is a copy; a compiler writes no input of its graph."""
    p, scores = problem_of(torch.float32)
    module = TaskCrossEntropy(p.task_weights, inplace_backward=True, backend="portable")
    assert "inplace_backward=True" in repr(module)

    def gradient(call: Callable[..., TaskLoss], logits: Tensor) -> Tensor:
        return torch.autograd.grad(call(logits, p.labels, p.task_ids).loss, logits)[0]

    wanted = gradient(TaskCrossEntropy(p.task_weights, backend="portable"), scores.clone().requires_grad_())
    with torch.autograd.graph.save_on_cpu():
        assert torch.equal(gradient(module, scores.clone().requires_grad_()), wanted)
    logits = scores.clone().requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(gradient(compiled, logits), wanted)
    assert torch.equal(logits, scores)
