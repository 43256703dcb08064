"""``recompute``, ``grad_weight_out``, ``max_tokens``: the portable backend and, in the interpreter, Triton's."""

import pytest
import torch

pytest.importorskip("triton")

from loss_problems import FP32, Problem, error, make_problem
from triton_on_cpu import on_cpu  # noqa: F401

from cotbal_kernels import linear_task_cross_entropy
from cotbal_kernels.reference import reference_linear_task_cross_entropy

pytestmark = [pytest.mark.usefixtures("on_cpu"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy's
BACKENDS = ["portable", "interpreter"]


def exact_gradients(p: Problem, **options) -> tuple[torch.Tensor, ...]:
    """Of the float64 reference, in float64: hidden, weight, bias."""
    wide = [tensor.detach().double().requires_grad_() for tensor in (p.hidden, p.weight, p.bias)]
    out = reference_linear_task_cross_entropy(*wide[:2], *p.tensors[2:], bias=wide[2], **options)
    return torch.autograd.grad(out.loss.sum(), wide)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregation", ["token", "none"])
def test_buffer_in_float32(backend: str, aggregation: str) -> None:
    """Added exactly once per backward pass to what was there; ``weight.grad`` stays as it is."""
    p = make_problem(D=24, V=150, ignored=0.1)
    buffer = torch.randn(150, 24, generator=torch.Generator().manual_seed(1))
    before = buffer.double()
    p.weight.grad = torch.full_like(p.weight, 7.0)
    wanted = exact_gradients(p, aggregation=aggregation)
    options = {"bias": p.bias, "aggregation": aggregation, "chunk_size": 8, "backend": backend}
    out = linear_task_cross_entropy(*p.tensors, grad_weight_out=buffer, **options)
    assert torch.equal(buffer.double(), before)  # nothing happens in the forward pass
    out.loss.sum().backward()
    assert error(buffer, before + wanted[1]) <= FP32
    assert error(buffer.double() - before, wanted[1]) <= FP32 * float(before.abs().max() / wanted[1].abs().max()) + FP32
    assert bool((p.weight.grad == 7).all())
    assert error(p.hidden.grad, wanted[0]) <= FP32
    assert error(p.bias.grad, wanted[2]) <= FP32
    linear_task_cross_entropy(*p.tensors, grad_weight_out=buffer, **options).loss.sum().backward()
    assert error(buffer, before + 2 * wanted[1]) <= 2 * FP32  # the second micro-batch


def test_buffer_under_a_compiler() -> None:
    """In the graph of the backward pass, once per pass, whichever labels come."""
    torch._dynamo.reset()
    p = make_problem(D=24, V=67)
    buffer = torch.ones(67, 24)

    def loss(labels: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        arguments = (p.hidden, p.weight, labels, p.task_ids, p.task_weights)
        return linear_task_cross_entropy(*arguments, bias=p.bias, grad_weight_out=into, backend="portable").loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wanted = buffer.double()
    for labels in (p.labels, p.labels.flip(0).contiguous()):
        compiled(labels, buffer).backward()
        p.labels = labels
        wanted = wanted + exact_gradients(p)[1]
        assert error(buffer, wanted) <= FP32
    assert p.weight.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_buffer_of_a_16_bit_weight(backend: str, narrow: torch.dtype, wide: bool) -> None:
    p = make_problem(D=24, V=150, ignored=0.1, dtype=narrow)
    dtype, half_a_unit = torch.float32 if wide else narrow, torch.finfo(narrow).eps / 2
    buffer = (0.1 * torch.randn(150, 24, generator=torch.Generator().manual_seed(1))).to(dtype)
    before = buffer.double()
    (_, wanted, _) = exact_gradients(p)
    out = linear_task_cross_entropy(*p.tensors, bias=p.bias, grad_weight_out=buffer, chunk_size=8, backend=backend)
    out.loss.backward()
    assert p.weight.grad is None
    # The gradient of the logits may be rounded to 16 bits before the product (half a unit, relative to the largest);
    # the sum is then rounded once, to half a unit in its last place.
    allowed = half_a_unit * wanted.abs().max() + (before + wanted).abs() * (2**-23 if wide else half_a_unit) + 1e-7
    assert bool(((buffer.double() - before - wanted).abs() <= allowed).all())
    assert float(wanted.abs().max()) > 10 * float(allowed.max())  # so a gradient that is missing or twice there shows


@pytest.mark.parametrize("backend", BACKENDS)
def test_buffer_of_a_frozen_head_is_left_alone(backend: str) -> None:
    p = make_problem(D=8, V=40)
    p.weight.requires_grad_(False)
    buffer = torch.full((40, 8), 3.0)
    linear_task_cross_entropy(*p.tensors, grad_weight_out=buffer, backend=backend).loss.backward()
    assert bool((buffer == 3).all())
    (wanted,) = torch.autograd.grad(reference_linear_task_cross_entropy(*p.tensors).loss, p.hidden)
    assert error(p.hidden.grad, wanted) <= FP32


@pytest.mark.parametrize("backend", BACKENDS)
def test_buffer_when_nothing_is_supervised(backend: str) -> None:
    p = make_problem((2, 5), D=8, V=40, ignored=1.1)
    buffer = torch.full((40, 8), 3.0)
    linear_task_cross_entropy(*p.tensors, grad_weight_out=buffer, backend=backend).loss.backward()
    assert bool((buffer == 3).all())
    assert p.weight.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [False, True])
def test_recompute_is_the_same_loss_and_keeps_nothing_as_large_as_the_weight(backend: str, shift: bool) -> None:
    p = make_problem(D=24, V=150)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    options = {"bias": p.bias, "label_smoothing": 0.1, "shift": shift, "chunk_size": 8, "backend": backend}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        again = linear_task_cross_entropy(*p.tensors, recompute=True, **options)
    own = {tensor.data_ptr() for tensor in (p.hidden, p.weight)}
    assert max(tensor.numel() for tensor in kept if tensor.data_ptr() not in own) < p.weight.numel() / 8
    at_once = linear_task_cross_entropy(*p.tensors, **options)
    inputs = (p.hidden, p.weight, p.bias, p.task_weights)
    reference = reference_linear_task_cross_entropy(*p.tensors, bias=p.bias, label_smoothing=0.1, shift=shift)
    wanted = torch.autograd.grad(reference.loss, inputs)
    for out in (again, at_once):
        assert error(out.loss, reference.loss) <= FP32
        for actual, expected in zip(torch.autograd.grad(out.loss, inputs), wanted, strict=True):
            # The gradient of lambda is a small difference: there the rounding of its terms counts.
            assert error(actual, expected) <= FP32 or float((actual - expected).abs().max()) <= 1e-6


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"aggregation": "none"}], ids=str)
def test_max_tokens_on_the_portable_backend(options: dict) -> None:
    """A CPU knows the count: a bound changes no bit, and one that is too small is an error."""
    p = make_problem()
    count = int((p.labels >= 0).sum())
    plain = linear_task_cross_entropy(*p.tensors, **options)
    inputs = (p.hidden, p.weight)
    wanted = torch.autograd.grad(plain.loss.sum(), inputs)
    for bound in (count, count + 1, 10**9):
        out = linear_task_cross_entropy(*p.tensors, max_tokens=bound, **options)
        assert torch.equal(out.loss, plain.loss)
        for a, b in zip(torch.autograd.grad(out.loss.sum(), inputs), wanted, strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match=f"max_tokens must be at least .* {count}, got {count - 1}"):
        linear_task_cross_entropy(*p.tensors, max_tokens=count - 1, **options)


def test_max_tokens_counts_what_is_computed() -> None:
    """Tasks of weight zero need no place, unless lambda has a gradient."""
    p = make_problem()
    lam = p.task_weights.detach().clone()
    lam[1] = 0
    count = int(((p.labels >= 0) & (p.task_ids != 1)).sum())
    arguments = (p.hidden, p.weight, p.labels, p.task_ids)
    out = linear_task_cross_entropy(*arguments, lam, max_tokens=count)
    assert error(out.loss, reference_linear_task_cross_entropy(*arguments, lam).loss) <= FP32
    with pytest.raises(ValueError, match="max_tokens must be at least"):
        linear_task_cross_entropy(*arguments, lam.requires_grad_(), max_tokens=count)
