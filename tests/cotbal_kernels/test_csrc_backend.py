"""The CUDA backend through the public functions, on the CPU build of its kernels, against the float64 reference."""

import functools
import math

import pytest
import torch
import vocabulary_shards
from csrc_backend_case import assert_same, gradients, linear_loss, needs_compiler, registered  # noqa: F401
from cuda_on_cpu import DESCENDING, SHUFFLED, schedule
from loss_problems import FP32, error, make_problem

from cotbal_kernels import task_cross_entropy as any_logits_loss
from cotbal_kernels.cuda_backend import CudaBackend
from cotbal_kernels.cuda_kernels import gradients as cuda_gradients
from cotbal_kernels.reference import reference_linear_task_cross_entropy, reference_task_cross_entropy

pytestmark = needs_compiler
logits_loss = functools.partial(any_logits_loss, backend="cuda_on_cpu")

AGGREGATIONS = ["token", "task", "sum", "none"]
OPTIONS = [
    {},
    {"logit_softcap": 1.5},
    {"label_smoothing": 0.2},
    {"z_loss": 0.05},
    {"logit_scale": 0.7},
    {"logit_softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 2.6},
]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_linear_matches_reference(aggregation: str, options: dict) -> None:
    """One chunk of some 30 rows without a bias; eight, the last ones with rows that are none, with one."""
    p = make_problem(sharpness=2.0)
    for bias, chunk_size in ((None, None), (p.bias, 7)):
        kwargs = {"aggregation": aggregation, "bias": bias, **options}
        inputs = [p.hidden, p.weight, p.task_weights, *([] if bias is None else [bias])]
        expected = reference_linear_task_cross_entropy(*p.tensors, **kwargs)
        assert_same(linear_loss(*p.tensors, chunk_size=chunk_size, **kwargs), expected, inputs)


@pytest.mark.parametrize("scale", [2.0**-12 * 1.3, 41.0])
def test_tiny_and_large_scales(scale: float) -> None:
    """Logits of the size of an ordinary head's where the scale is large, all nearly equal where it is tiny."""
    p = make_problem(sharpness=2 / max(1.0, scale))
    kwargs = {"logit_scale": scale, "bias": p.bias, "aggregation": "sum"}
    p.bias.data /= max(1.0, scale)
    inputs = (p.hidden, p.weight, p.bias, p.task_weights)
    assert_same(linear_loss(*p.tensors, **kwargs), reference_linear_task_cross_entropy(*p.tensors, **kwargs), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0, "smoothing": 0.1, "z_loss": 0.01, "scale": 0.7}], ids=["plain", "all"]
)
def test_shards_of_a_vocabulary(cuda_on_cpu: CudaBackend, dtype: torch.dtype, options: dict) -> None:
    p = make_problem(V=vocabulary_shards.BOUNDS[-1], dtype=dtype, sharpness=2.0)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    vocabulary_shards.check_shards(cuda_on_cpu, p, options, with_bias=bool(options), chunk_size=17, rounding=rounding)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_logits_match_reference(aggregation: str, options: dict) -> None:
    p = make_problem(sharpness=2.0)
    logits = (p.hidden @ p.weight.t()).detach().requires_grad_()
    args = (logits, p.labels, p.task_ids, p.task_weights)
    expected = reference_task_cross_entropy(*args, aggregation=aggregation, **options)
    assert_same(logits_loss(*args, aggregation=aggregation, **options), expected, (logits, p.task_weights))


@pytest.mark.parametrize(("shape", "D", "V", "K"), [((1, 1), 1, 1, 1), ((1, 1), 5, 9, 2), ((2, 40), 7, 2500, 64)])
@pytest.mark.parametrize("recompute", [False, True])
def test_shapes(shape: tuple[int, ...], D: int, V: int, K: int, recompute: bool) -> None:
    """One word; one row; more tasks than most have rows, two tiles of vocabulary."""
    p = make_problem(shape, D=D, V=V, K=K, ignored=0.0 if shape == (1, 1) else 0.3)
    expected = reference_linear_task_cross_entropy(*p.tensors)
    inputs = (p.hidden, p.weight, p.task_weights)
    assert_same(linear_loss(*p.tensors, recompute=recompute, chunk_size=33), expected, inputs)


@pytest.mark.parametrize("shape", [(2, 5), (0, 5), (2, 0)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_supervised(shape: tuple[int, ...], recompute: bool, dtype: torch.dtype) -> None:
    p = make_problem(shape, ignored=1.1, dtype=dtype)
    p.hidden.data.fill_(math.nan)  # never looked at
    out = linear_loss(*p.tensors, bias=p.bias, recompute=recompute)
    assert out.loss.item() == 0
    for gradient in torch.autograd.grad(out.loss, (p.hidden, p.weight, p.bias, p.task_weights)):
        assert bool((gradient == 0).all())
    logits = torch.zeros(*shape, 9, requires_grad=True)
    loss = logits_loss(logits, p.labels, p.task_ids, p.task_weights).loss
    assert bool((torch.autograd.grad(loss, logits)[0] == 0).all())


def test_rows_that_are_none_cost_no_digits(cuda_on_cpu: CudaBackend) -> None:
    """NaN at unsupervised positions and behind them; a task of weight 0; the same bits for every tight capacity."""
    p = make_problem((4, 15), ignored=0.5)
    p.task_weights.requires_grad_(False)
    p.task_weights[1] = 0
    p.hidden.data[p.labels == -100] = math.nan
    p.hidden.data[-1, -1] = math.nan  # the row that positions behind the last are clamped to
    p.labels[-1, -1] = -100
    computed = int(((p.labels != -100) & (p.task_ids != 1)).sum())
    clean = make_problem((4, 15), ignored=0.5)
    clean.task_weights.data, clean.labels = p.task_weights, p.labels
    expected = reference_linear_task_cross_entropy(*clean.tensors)
    wanted = torch.autograd.grad(expected.loss, (clean.hidden, clean.weight))
    for max_tokens in (None, computed, computed + 3):
        out = linear_loss(*p.tensors, max_tokens=max_tokens, chunk_size=11)
        assert error(out.loss, expected.loss) <= FP32
        assert out.task_loss[1] == out.task_correct[1] == 0
        for actual, b in zip(torch.autograd.grad(out.loss, (p.hidden, p.weight)), wanted, strict=True):
            assert error(actual, b) <= FP32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharpness", [0.5, 4.0, 16.0])  # from nearly uniform to nearly certain
@pytest.mark.parametrize(
    "kwargs", [{}, {"chunk_size": 9}, {"aggregation": "none"}, {"recompute": True, "chunk_size": 9}]
)
def test_16_bit_is_no_worse_than_materialising(dtype: torch.dtype, sharpness: float, kwargs: dict) -> None:
    """Error at most that of logits in this dtype with a float64 softmax behind them, on the same inputs."""
    p = make_problem((2, 40), D=64, V=300, dtype=dtype, sharpness=sharpness)
    inputs, aggregation = (p.hidden, p.weight), kwargs.get("aggregation", "token")
    rest = p.tensors[2:]
    materialised = reference_task_cross_entropy(p.hidden @ p.weight.t(), *rest, aggregation=aggregation)
    ordinary = gradients(materialised.loss, *inputs)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = reference_linear_task_cross_entropy(*wide, *rest, aggregation=aggregation)
    out = linear_loss(*p.tensors, **kwargs)
    assert error(out.loss, expected.loss) <= FP32
    found = gradients(out.loss, *inputs)
    for actual, baseline, wanted in zip(found, ordinary, gradients(expected.loss, *wide), strict=True):
        assert actual.dtype == dtype
        assert error(actual, wanted) <= error(baseline, wanted)
        # Two roundings: that of the gradient of the logits, which the products read, and that of the result.
        assert error(actual, wanted) <= torch.finfo(dtype).eps + FP32


@pytest.mark.parametrize("kwargs", [{}, {"chunk_size": 9}, {"recompute": True}, {"recompute": True, "chunk_size": 9}])
@pytest.mark.parametrize("scale", [1.0, 2.0**-16 * 1.3])
def test_fp16_gradients_survive_a_late_loss_scale(kwargs: dict, scale: float) -> None:
    """Divided by 1e6 tokens, and times a small scale of the logits, they underflow in float16, already on their way
    into the products."""
    p, late = make_problem(dtype=torch.float16), 65536 / scale
    kwargs = {"logit_scale": scale, **kwargs}
    common = {"bias": p.bias, "normalizer": 1e6, "logit_scale": scale}
    expected = reference_linear_task_cross_entropy(*p.tensors, **common)
    inputs = (p.hidden, p.weight, p.bias)
    wanted = torch.autograd.grad(expected.loss * late, inputs)
    out = linear_loss(*p.tensors, bias=p.bias, normalizer=1e6, **kwargs)
    found = torch.autograd.grad(out.loss * late, inputs)
    for actual, b in zip(found, wanted, strict=True):
        assert error(actual, b) <= torch.finfo(torch.float16).eps + FP32  # two roundings
    into = torch.ones(p.weight.shape)
    loss = linear_loss(*p.tensors, bias=p.bias, normalizer=1e6, grad_weight_out=into, **kwargs).loss
    (loss * late).backward()
    assert error(into - 1, wanted[1]) <= torch.finfo(torch.float16).eps + 1e-5  # 1 + x keeps x to 6e-8 of 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", ["float32", "same"])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_gradient_into_a_buffer(
    dtype: torch.dtype, out_dtype: str, chunk_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Added in float32 to what is there, with one rounding, in blocks of one tile with a ragged last one."""
    monkeypatch.setattr(cuda_gradients, "BLOCK_BYTES", 1)
    p = make_problem((3, 17), V=300, dtype=dtype)
    wide = [p.hidden.detach().double(), p.weight.detach().double().requires_grad_()]
    expected = reference_linear_task_cross_entropy(*wide, *p.tensors[2:])
    (wanted,) = torch.autograd.grad(expected.loss, wide[1])
    into = torch.randn(p.weight.shape, generator=torch.Generator().manual_seed(3)) / 100
    into = into if out_dtype == "float32" else into.to(dtype)
    before = into.double()
    linear_loss(*p.tensors, grad_weight_out=into, chunk_size=chunk_size).loss.backward()
    assert p.weight.grad is None
    assert p.hidden.grad is not None
    # The rounding of the gradient of the logits (float32 has none), then the one of the sum.
    of_logits = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    bound = (of_logits + FP32) * float(wanted.abs().max()) + torch.finfo(into.dtype).eps / 2 * (before + wanted).abs()
    assert bool(((into.double() - before - wanted).abs() <= bound).all())


def test_bf16_weight_gradient_does_not_drift_over_chunks() -> None:
    """Summed in float32 over 200 chunks and rounded once; sums in bf16 are off by percents."""
    p = make_problem((1, 200), D=16, V=20, dtype=torch.bfloat16, ignored=0.0)
    wide = p.weight.detach().double().requires_grad_()
    expected = reference_linear_task_cross_entropy(p.hidden.detach(), wide, *p.tensors[2:])
    (wanted,) = torch.autograd.grad(expected.loss, wide)
    for recompute in (False, True):
        out = linear_loss(*p.tensors, chunk_size=1, recompute=recompute)
        (actual,) = torch.autograd.grad(out.loss, p.weight)
        assert error(actual, wanted) <= torch.finfo(torch.bfloat16).eps + FP32


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("recompute", [False, True])
def test_large_offsets_lose_nothing(offset: float, recompute: bool) -> None:
    """An offset common to all logits, as a bias; values are multiples of 2^-9, to which it adds exactly."""
    plain = (torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 512).round() / 512
    hidden, weight, bias = plain.clone().requires_grad_(), torch.eye(70, 8), torch.full((70,), offset)
    labels, ids = torch.arange(50), torch.zeros(50, dtype=torch.int64)
    args = (hidden, weight, labels, ids, torch.ones(1))
    out, expected = (
        linear_loss(*args, bias=bias, recompute=recompute),
        reference_linear_task_cross_entropy(*args, bias=bias),
    )
    assert error(out.loss, expected.loss) <= FP32
    actual, wanted = (torch.autograd.grad(o.loss, hidden)[0] for o in (out, expected))
    assert error(actual, wanted) <= FP32


@pytest.mark.parametrize("only", ["hidden", "weight", "bias", "task_weights"])
@pytest.mark.parametrize("recompute", [False, True])
def test_one_input_requires_grad(only: str, recompute: bool) -> None:
    p = make_problem()
    wanted = torch.autograd.grad(reference_linear_task_cross_entropy(*p.tensors, bias=p.bias).loss, getattr(p, only))[0]
    q = make_problem()
    for name in ("hidden", "weight", "bias", "task_weights"):
        getattr(q, name).requires_grad_(name == only)
    linear_loss(*q.tensors, bias=q.bias, recompute=recompute, chunk_size=20).loss.backward()
    assert error(getattr(q, only).grad, wanted) <= 10 * FP32


def test_a_second_backward_finds_the_same() -> None:
    """The third one is told that it is the last, and scales in place."""
    p = make_problem(dtype=torch.bfloat16)
    out = linear_loss(*p.tensors)
    found = [torch.autograd.grad(3 * out.loss, (p.hidden, p.weight), retain_graph=keep) for keep in (True, True, False)]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_whatever_order_threads_run_in(dtype: torch.dtype) -> None:
    found = []
    for order in (None, DESCENDING, SHUFFLED):
        p = make_problem(V=2500, dtype=dtype)
        with schedule(order or 0):
            out = linear_loss(*p.tensors, bias=p.bias, chunk_size=7)
            found.append([*out, *torch.autograd.grad(out.loss, (p.hidden, p.weight, p.bias, p.task_weights))])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_non_contiguous_inputs() -> None:
    p = make_problem((4, 6))
    hidden = p.hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    weight = p.weight.detach().t().contiguous().t().requires_grad_()
    expected = reference_linear_task_cross_entropy(hidden, weight, *p.tensors[2:])
    assert_same(linear_loss(hidden, weight, *p.tensors[2:]), expected, (hidden, weight))
    columns = torch.randn(67, 24).t().requires_grad_()  # neighbouring rows instead of columns
    strided = torch.randn(24, 2, 67)[:, 1].requires_grad_()
    for logits in (columns, strided):
        args = (logits, p.labels.flatten(), p.task_ids.flatten(), p.task_weights)
        assert_same(
            logits_loss(*args, aggregation="none"), reference_task_cross_entropy(*args, aggregation="none"), (logits,)
        )


def test_float64_goes_to_the_portable_backend() -> None:
    p = make_problem((2, 4), D=3, V=5, dtype=torch.float64)
    weights = p.task_weights.detach()
    for aggregation in ("token", "none"):

        def loss(hidden, weight, bias, aggregation=aggregation):
            args = (hidden, weight, p.labels, p.task_ids, weights)
            return linear_loss(*args, bias=bias, aggregation=aggregation, chunk_size=3).loss

        assert torch.autograd.gradcheck(loss, (p.hidden, p.weight, p.bias))
    logits = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: logits_loss(z, p.labels, p.task_ids, weights).loss, (logits,))
