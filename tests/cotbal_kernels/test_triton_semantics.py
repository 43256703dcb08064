"""Edge cases of the Triton backend, in the interpreter."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from loss_problems import FP32, error, make_problem
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_on_cpu import INTERPRETED, assert_same, compare, gradients, on_cpu, upstream_like  # noqa: F401

from cotbal_kernels import linear_task_cross_entropy, task_cross_entropy
from cotbal_kernels.reference import reference_linear_task_cross_entropy
from cotbal_kernels.triton_kernels import head

pytestmark = [pytest.mark.usefixtures("on_cpu"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy's
ON_CPU = {"backend": "interpreter"}


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"aggregation": "none"}], ids=str)
@pytest.mark.parametrize("shape", [(2, 5), (0, 5)])
def test_nothing_supervised(options: dict, shape: tuple[int, ...]) -> None:
    """Loss 0 in the graph and zero gradients, so that no rank falls out of a collective."""
    p = make_problem(shape, ignored=1.1)
    out = linear_task_cross_entropy(*p.tensors, bias=p.bias, **options, **ON_CPU)
    assert bool((out.loss == 0).all())
    out.loss.sum().backward()
    for leaf in (p.hidden, p.weight, p.bias, p.task_weights):
        assert leaf.grad is not None
        assert bool((leaf.grad == 0).all())
    assert out.task_loss.tolist() == out.task_tokens.tolist() == out.task_correct.tolist() == [0] * 4


@pytest.mark.parametrize("shape", [(0, 5), (2, 5)])
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"chunk_size": 1}], ids=str)
def test_every_descriptor_has_an_address(
    monkeypatch: pytest.MonkeyPatch, options: dict, shape: tuple[int, ...]
) -> None:
    """Of no rows too: empty tensors are at address 0, of which a driver need not make a descriptor."""
    check, addresses = TensorDescriptor.__post_init__, []

    def spy(descriptor: TensorDescriptor) -> None:
        addresses.append(descriptor.base.data_ptr())
        check(descriptor)

    monkeypatch.setattr(TensorDescriptor, "__post_init__", spy)
    monkeypatch.setattr(head, "can_use_tma", lambda _: True)
    out = linear_task_cross_entropy(*make_problem(shape, V=90).tensors, **options, **ON_CPU)
    out.loss.backward()
    assert addresses
    assert all(addresses)


@pytest.mark.parametrize(
    "sizes",
    [
        {"shape": (1, 1), "D": 5, "V": 1, "K": 1},  # one of everything: loss and gradients are 0
        {"shape": (1, 1), "D": 70, "V": 67, "K": 1},
        {"shape": (2, 30), "D": 9, "V": 20, "K": 64},  # vocabulary smaller than a tile, mostly absent tasks
    ],
    ids=str,
)
def test_extreme_sizes(sizes: dict) -> None:
    compare(make_problem(**sizes, ignored=0.0), FP32, True)


def test_weights_of_zero() -> None:
    p = make_problem(V=40, ignored=0.1)
    p.task_weights.data[1] = 0
    compare(p, FP32)  # lambda has a gradient, so the task is computed
    frozen = dataclasses.replace(p, task_weights=p.task_weights.detach())
    out = linear_task_cross_entropy(*frozen.tensors, **ON_CPU)
    wanted = reference_linear_task_cross_entropy(*p.tensors)
    assert error(out.loss, wanted.loss) <= FP32
    assert out.task_loss[1] == out.task_correct[1] == 0
    assert bool((out.lse[p.task_ids == 1] == 0).all())
    assert out.task_tokens.tolist() == wanted.task_tokens.tolist()


def test_max_tokens() -> None:
    """A bound changes no bit; one that is too small is NaN, or an error where values are checked."""
    p = make_problem(V=150)
    count = int((p.labels >= 0).sum())
    plain = linear_task_cross_entropy(*p.tensors, chunk_size=8, **ON_CPU)
    bounded = linear_task_cross_entropy(*p.tensors, chunk_size=8, max_tokens=count, **ON_CPU)
    assert torch.equal(plain.loss, bounded.loss)
    inputs = (p.hidden, p.weight)
    for a, b in zip(gradients(plain, *inputs), gradients(bounded, *inputs), strict=True):
        assert error(b, a) <= FP32  # other slices
    short = linear_task_cross_entropy(*p.tensors, max_tokens=count - 1, **ON_CPU)
    assert bool(short.loss.isnan())
    with pytest.raises(ValueError, match=f"max_tokens must be at least .* {count}, got {count - 1}"):
        linear_task_cross_entropy(*p.tensors, max_tokens=count - 1, check=True, **ON_CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.labels.__setitem__((1, 2), 67), r"labels must be in \[0, 67\) where supervised, got 67"),
        (lambda p: p.labels.__setitem__((1, 2), -1), r"labels must be .*got -1"),
        (lambda p: p.task_ids.__setitem__((0, 0), 4), r"task_ids must be in \[0, 4\).*got 4"),
        (lambda p: p.task_ids.__setitem__((0, 0), -1), r"task_ids must be .*got -1"),
        (lambda p: p.task_weights.data.__setitem__(3, -1.0), r"task_weights must be finite and >= 0, got -1.0"),
        (lambda p: p.task_weights.data.__setitem__(3, float("inf")), r"task_weights must be finite.*got inf"),
        (lambda p: p.task_weights.data.__setitem__(3, float("nan")), r"task_weights must be finite.*got nan"),
    ],
)
def test_values_out_of_range_are_nan_or_an_error(change, message: str) -> None:
    """Without a host synchronisation nothing can raise; with ``check`` it does."""
    p = make_problem((2, 5), V=67, ignored=0.0)
    change(p)
    with torch.no_grad():
        for options in ({}, {"aggregation": "task"}):
            assert bool(linear_task_cross_entropy(*p.tensors, **options, **ON_CPU).loss.isnan())
    with pytest.raises(ValueError, match=message):
        linear_task_cross_entropy(*p.tensors, check=True, **ON_CPU)


@pytest.mark.parametrize("options", [{"chunk_size": 8}, {"aggregation": "none"}], ids=str)
def test_unsupervised_positions_may_hold_anything(options: dict) -> None:
    """NaN and Inf in hidden states and upstream gradients, ids out of range: never looked at."""
    p = make_problem(V=90)
    ignored = p.labels == -100
    clean = linear_task_cross_entropy(*p.tensors, **options, **ON_CPU)
    inputs = (p.hidden, p.weight)
    wanted = gradients(clean, *inputs)
    p.hidden.data[ignored] = float("nan")
    p.hidden.data[0, ignored[0].nonzero()[0]] = float("inf")
    p.task_ids[ignored] = -7
    out = linear_task_cross_entropy(*p.tensors, **options, **ON_CPU)
    assert torch.equal(out.loss, clean.loss)
    upstream = upstream_like(out.loss)
    if out.loss.dim():
        upstream[ignored] = float("nan")
    for a, b in zip(torch.autograd.grad(out.loss, inputs, upstream), wanted, strict=True):
        assert error(a, b) <= FP32


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("options", [{"chunk_size": 8}, {"recompute": True}], ids=str)
def test_large_offsets_lose_nothing(offset: float, options: dict) -> None:
    """Loss as log l - (z - m), kept exponentials relative to a maximum: a common offset changes nothing."""
    generator = torch.Generator().manual_seed(0)
    # Multiples of 2^-9: adding 1e4 to them is exact in float32.
    hidden = ((torch.randn(30, 8, generator=generator) * 512).round() / 512).requires_grad_()
    labels, ids = torch.randint(150, (30,), generator=generator), torch.zeros(30, dtype=torch.int64)
    args = (hidden, torch.eye(150, 8).requires_grad_(), labels, ids, torch.ones(1))
    bias = torch.full((150,), offset)
    out = linear_task_cross_entropy(*args, bias=bias, **options, **ON_CPU)
    expected = reference_linear_task_cross_entropy(*args, bias=bias)
    assert error(out.loss, expected.loss) <= FP32
    for a, b in zip(gradients(out, *args[:2]), gradients(expected, *args[:2]), strict=True):
        assert error(a, b) <= FP32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=["kept", "recomputed"])
def test_target_minus_one_is_formed_before_rounding(dtype: torch.dtype, options: dict) -> None:
    """p = .9992 rounded to float16 before p - 1 is off by a fifth; to bfloat16, by all of it."""
    V, p_target = 70, 0.9992
    hidden, weight = torch.zeros(1, 8, dtype=dtype), torch.zeros(V, 8, dtype=dtype)
    hidden[0, 0] = 1
    weight[40, 0] = float(torch.tensor(p_target * (V - 1) / (1 - p_target)).log())
    exact = torch.softmax(weight.double()[:, 0], 0)[40] - 1
    args = (torch.tensor([40]), torch.tensor([0]), torch.ones(1))
    hidden.requires_grad_()
    weight.requires_grad_()
    out = linear_task_cross_entropy(hidden, weight, *args, **options, **ON_CPU)
    grad_hidden, grad_weight = torch.autograd.grad(out.loss, (hidden, weight))
    # p is next to 1, where float32 numbers are 6e-8 apart: log, exponent and their arguments cost some of them,
    # relative to 1 - p. The gradient of the logits and the result are rounded once each.
    tolerance = 4 * 6e-8 / (1 - p_target) + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert error(grad_weight[40, 0], exact) <= tolerance
    assert error(grad_hidden[0, 0], exact * weight[40, 0].detach().double()) <= tolerance
    rounded = exact.add(1).to(torch.float16 if dtype == torch.float32 else dtype).double() - 1
    assert error(rounded, exact) > 20 * tolerance  # so the mistake would be seen


def test_non_contiguous_inputs() -> None:
    p = make_problem((4, 7), V=90, ignored=0.2)
    expected = reference_linear_task_cross_entropy(*p.tensors, bias=p.bias)

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        """Same values, with something that would be noticed between every two of them."""
        memory = torch.full((*tensor.shape, 2), float("nan") if tensor.is_floating_point() else 77).to(tensor.dtype)
        memory[..., 0] = tensor.detach()
        return memory[..., 0]

    wide = p.hidden.detach().transpose(0, 1).contiguous().transpose(0, 1)
    labels, ids = p.labels.t().contiguous().t(), spread(p.task_ids)
    leaves = [tensor.requires_grad_() for tensor in (wide, spread(p.weight), spread(p.task_weights), spread(p.bias))]
    assert not any(tensor.is_contiguous() for tensor in (*leaves, labels, ids))
    out = linear_task_cross_entropy(*leaves[:2], labels, ids, leaves[2], bias=leaves[3], **ON_CPU)
    assert_same(out, expected)
    wanted = gradients(expected, p.hidden, p.weight, p.bias)
    for a, b in zip(gradients(out, *leaves[:2], leaves[3]), wanted, strict=True):
        assert error(a, b) <= FP32
    rows = torch.stack([p.weight.detach(), torch.zeros(90, 24)], 1)[:, 0]  # a stride between rows needs no copy
    assert rows.stride() == (48, 1)
    assert torch.equal(linear_task_cross_entropy(p.hidden, rows, *p.tensors[2:], bias=p.bias, **ON_CPU).loss, out.loss)


def test_a_tie_is_a_hit_for_the_first_argmax_only() -> None:
    """Within a block of 32 columns, between blocks, between tiles of 64 and between slices."""
    columns = torch.tensor([3, 3, 9, 40, 70, 149])
    weight = torch.zeros(150, 8)
    for row, column in enumerate((9, 40, 3, 3, 40, 3)):  # the other largest logit
        weight[column, row] = weight[columns[row], row] = 1
    hidden, labels, ids = torch.eye(6, 8).requires_grad_(), columns, torch.arange(6)
    weight.requires_grad_()
    for chunk_size in (None, 1):
        out = linear_task_cross_entropy(hidden, weight, labels, ids, torch.ones(6), chunk_size=chunk_size, **ON_CPU)
        assert out.task_correct.tolist() == [1, 1, 0, 0, 0, 0]
    logits = (hidden @ weight.t()).detach()
    out = task_cross_entropy(logits, labels, ids, torch.ones(6), **ON_CPU)
    assert out.task_correct.tolist() == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {"chunk_size": 8}), (torch.float32, {"recompute": True}), (torch.bfloat16, {"chunk_size": 8})],
    ids=str,
)  # bfloat16: exponentials of 0 in 12 bits
def test_words_forbidden_by_a_bias_of_minus_infinity(dtype: torch.dtype, options: dict) -> None:
    """Vocabularies are padded that way, here by more than a block of columns at either end."""
    p = make_problem(V=150, dtype=dtype)
    p.bias.data[:33] = p.bias.data[110:] = float("-inf")
    p.labels[p.labels >= 0] = p.labels[p.labels >= 0] % 70 + 35
    out = linear_task_cross_entropy(*p.tensors, bias=p.bias, **options, **ON_CPU)
    shown = p.weight[33:110], torch.where(p.labels >= 0, p.labels - 33, -100)  # the words that remain
    expected = reference_linear_task_cross_entropy(p.hidden, *shown, p.task_ids, p.task_weights, bias=p.bias[33:110])
    assert_same(out, expected)
    inputs = (p.hidden, p.weight, p.bias)
    for a, b in zip(gradients(out, *inputs), gradients(expected, *inputs), strict=True):
        assert error(a, b) <= (FP32 if dtype == torch.float32 else 2.0**-7)


@pytest.mark.parametrize("options", [{"chunk_size": 8}, {"aggregation": "none"}], ids=str)
def test_second_backward_and_second_run_are_bitwise_the_same(options: dict) -> None:
    p = make_problem(V=90, dtype=torch.float16)
    inputs = (p.hidden, p.weight, p.task_weights)
    out = linear_task_cross_entropy(*p.tensors, **options, **ON_CPU)
    first, second = gradients(out, *inputs), gradients(out, *inputs)
    again = linear_task_cross_entropy(*p.tensors, **options, **ON_CPU)
    assert torch.equal(out.loss, again.loss)
    for a, b, c in zip(first, second, gradients(again, *inputs), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("options", [{"chunk_size": 8}, {"recompute": True}], ids=str)
def test_float16_gradients_survive_a_late_loss_scale(options: dict) -> None:
    """Divided by 1e6 tokens, times a small scale of the logits, they are below what float16 holds until it arrives."""
    p, scale = make_problem(V=90, dtype=torch.float16), 2.0**-16 * 1.3
    common = {"normalizer": 1e6, "logit_scale": scale}
    expected = reference_linear_task_cross_entropy(*p.tensors, **common)
    wanted = torch.autograd.grad(expected.loss * (65536 / scale), (p.hidden, p.weight))
    out = linear_task_cross_entropy(*p.tensors, **common, **options, **ON_CPU)
    # Two roundings to 11 bits, and the spacing of subnormal results.
    for a, b in zip(torch.autograd.grad(out.loss * (65536 / scale), (p.hidden, p.weight)), wanted, strict=True):
        assert error(a, b) <= 2**-10 + 2**-25 / float(b.abs().max())


def test_float64_goes_to_the_portable_backend() -> None:
    p = make_problem((2, 4), D=3, V=5, dtype=torch.float64)
    out, portable = (linear_task_cross_entropy(*p.tensors, backend=name) for name in ("interpreter", "portable"))
    assert out.loss.dtype == torch.float64
    assert torch.equal(out.loss, portable.loss)
    for a, b in zip(gradients(out, p.hidden, p.weight), gradients(portable, p.hidden, p.weight), strict=True):
        assert torch.equal(a, b)
