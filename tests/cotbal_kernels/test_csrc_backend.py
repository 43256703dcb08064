"""The CUDA backend through the public functions, on the CPU build of its kernels, against the float64 reference."""

import functools
import math
from collections.abc import Iterator

import pytest
import torch
import vocabulary_shards
from cuda_on_cpu import DESCENDING, SHUFFLED, WideningProducts, cpu_backend, find_compiler, kernels_for, schedule
from loss_problems import FP32, Problem, error, make_problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cotbal_kernels import backends, cuda_backend, cuda_gradients, cuda_products, ops, portable
from cotbal_kernels import linear_task_cross_entropy as any_linear_loss
from cotbal_kernels import task_cross_entropy as any_logits_loss
from cotbal_kernels.cuda_backend import CudaBackend
from cotbal_kernels.interface import Backend, LinearProblem, Targets, TokenLoss
from cotbal_kernels.reference import reference_linear_task_cross_entropy, reference_task_cross_entropy

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: CXX, g++, c++")

linear_loss = functools.partial(any_linear_loss, backend="cuda_on_cpu")
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


@pytest.fixture(autouse=True)
def cuda_on_cpu() -> Iterator[CudaBackend]:
    """Registered for the length of a test; one thread, since the tensors are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    backend = cpu_backend()
    backends.register_backend("cuda_on_cpu", backend)
    yield backend
    del backends.BACKENDS["cuda_on_cpu"]
    torch.set_num_threads(before)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """With an upstream gradient that differs from row to row where the loss is one per position."""
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return torch.autograd.grad(loss, inputs, upstream, retain_graph=True)


def assert_same(out, expected, inputs, tolerance: float = FP32) -> None:
    for actual, wanted in zip(out[:2] + out[4:], expected[:2] + expected[4:], strict=True):
        assert actual.dtype == torch.float32
        assert error(actual, wanted) <= tolerance
    assert out.task_tokens.tolist() == expected.task_tokens.tolist()
    assert out.task_correct.tolist() == expected.task_correct.tolist()
    for actual, wanted in zip(gradients(out.loss, *inputs), gradients(expected.loss, *inputs), strict=True):
        # d loss / d lambda is a difference of terms up to a hundred times larger: float32 rounding of those.
        assert error(actual, wanted) <= tolerance or float((actual - wanted).abs().max()) <= 1e-6


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


# --- cost: what the host reads, what is allocated -----------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes every op that reads a value back to the host or has a shape that depends on one, and the largest result."""

    SYNCHRONISING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.synchronised: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.SYNCHRONISING:
            self.synchronised.append(str(func))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel() * result.element_size())
        return result


def arguments(p: Problem) -> tuple[LinearProblem, Targets, Tensor]:
    """What the ops hand to a backend."""
    lam = p.task_weights.detach()
    sizes = (p.weight.shape[0], -100, True, False, p.labels.numel())
    targets = portable.prepare_targets(p.labels.flatten(), p.task_ids.flatten(), lam, *sizes)
    head = p.hidden.detach().flatten(0, 1), p.weight.detach(), p.bias.detach()
    return LinearProblem(*head, targets.targets_M, targets.rows_N, targets.num_rows), targets, lam


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_read_back_to_the_host(cuda_on_cpu: CudaBackend, dtype: torch.dtype) -> None:
    p = make_problem(dtype=dtype)
    problem, targets, lam = arguments(p)
    spec, need = TokenLoss(2.0, 0.1, 0.01, 0.7, 0.1 / 67), (True,) * 3
    logits, grad_M = torch.randn(51, 67).to(dtype), torch.rand(51)
    with Watch() as watch:
        out = cuda_on_cpu.linear_forward(problem, targets.tasks_M, lam, need, spec, 7)
        cuda_on_cpu.scale_gradient(out.grad_weight_VD, torch.tensor(2.0), out.grad_weight_VD.to(dtype))
        *_, stats = cuda_on_cpu.linear_rows_forward(problem, spec, 7)
        for into in (None, torch.zeros(67, 24), torch.zeros(67, 24, dtype=dtype)):
            cuda_on_cpu.linear_rows_backward(problem, grad_M, stats, into, need, spec, 7, dtype)
        *_, stats = cuda_on_cpu.logits_rows_forward(logits, targets.targets_M, spec, 0)
        cuda_on_cpu.logits_rows_backward(grad_M, logits, targets.targets_M, stats, spec, 0)
    assert watch.synchronised == []
    assert watch.largest > 0
    with Watch() as watch:
        assert bool(grad_M.sum() > 0)
    assert watch.synchronised != []  # it can tell


def test_the_workspace_is_bounded(cuda_on_cpu: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """No result beyond the workspace: M x V in float32 would be 30 times larger."""
    monkeypatch.setattr(cuda_backend, "WORKSPACE_BYTES", 2**16)
    p = make_problem((1, 400), D=4, V=1000, ignored=0.0, dtype=torch.bfloat16)
    problem, targets, lam = arguments(p)
    with Watch() as watch:
        cuda_on_cpu.linear_forward(problem, targets.tasks_M, lam, (True,) * 3, TokenLoss(), 0)
    assert 2**15 < watch.largest <= 2**16
    expected = reference_linear_task_cross_entropy(*p.tensors)
    assert error(linear_loss(*p.tensors).loss, expected.loss) <= FP32


def test_default_chunks_are_as_few_as_whole_tiles_allow() -> None:
    """At V = 128256 a row of logits takes 501 KiB of the 512 MiB."""
    row_bytes = 4 * 128256
    limit = cuda_backend.WORKSPACE_BYTES // row_bytes
    assert limit == 1046
    for capacity, size in ((1, 1), (700, 700), (1046, 1046), (1047, 640), (1700, 896), (1966, 1024), (20000, 1024)):
        assert cuda_backend.default_chunk(capacity, row_bytes) == size
    for capacity in (8192, 16384):
        assert capacity % cuda_backend.default_chunk(capacity, row_bytes) == 0  # all of 1024
    for capacity in range(1047, 30_000, 131):
        sizes = range(128, limit, 128)
        fewest = min(math.ceil(capacity / size) for size in sizes)
        smallest = min(size for size in sizes if math.ceil(capacity / size) == fewest)
        assert cuda_backend.default_chunk(capacity, row_bytes) == smallest
    assert cuda_backend.default_chunk(7, 2**28) == 2  # two rows of a quarter of a gigabyte
    assert cuda_backend.default_chunk(7, 2**30) == 1  # a row that does not fit is computed nevertheless


class NotedProducts(WideningProducts):
    """Which product went where."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def wide(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        self.calls.append(("wide", tuple(out.shape), out.dtype))
        super().wide(left, right, out)

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        self.calls.append(("add", tuple(total.shape), total.dtype))
        super().add(total, left, right)

    def rounded(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        self.calls.append(("rounded", tuple(out.shape), out.dtype))
        super().rounded(left, right, out)


def test_products_and_buffers() -> None:
    """Three products a chunk, none for a side that is frozen; float32 V x D only where 16-bit dW has several chunks."""
    f32, bf16, V, D = torch.float32, torch.bfloat16, 400, 64
    logits, hidden = ("wide", (30, V), f32), ("wide", (30, D), f32)
    for dtype, need, chunk_size, expected in (
        (bf16, (True, True, True), 0, [logits, hidden, ("rounded", (V, D), bf16)]),
        (f32, (True, True, True), 0, [logits, hidden, ("wide", (V, D), f32)]),
        (bf16, (True, False, False), 0, [logits, hidden]),
        (bf16, (False, True, False), 0, [logits, ("rounded", (V, D), bf16)]),
        (bf16, (False, False, False), 0, [logits]),
        (
            *(bf16, (False, True, False), 20),
            [("wide", (20, V), f32), ("wide", (V, D), f32), ("wide", (10, V), f32), ("add", (V, D), f32)],
        ),
    ):
        p = make_problem((1, 30), D=D, V=V, dtype=dtype)
        problem, targets, lam = arguments(p)
        products = NotedProducts()
        backend = CudaBackend(kernels_for, products)
        out = backend.linear_forward(problem, targets.tasks_M, lam, need, TokenLoss(), chunk_size)
        assert products.calls == expected
        found = (out.grad_hidden_MD, out.grad_weight_VD, out.grad_bias_V)
        full = (30 * D, V * D, V)
        assert [g.numel() for g in found] == [n if wanted else 0 for n, wanted in zip(full, need, strict=True)]
    # Into a float32 buffer there is no other one, whatever the number of chunks.
    p = make_problem((1, 30), D=D, V=V, dtype=bf16)
    problem, *_ = arguments(p)
    products = NotedProducts()
    backend, spec = CudaBackend(kernels_for, products), TokenLoss()
    *_, stats = backend.linear_rows_forward(problem, spec, 20)
    products.calls.clear()
    need = (False, True, False)
    backend.linear_rows_backward(problem, torch.ones(30), stats, torch.zeros(V, D), need, spec, 20, bf16)
    add = ("add", (V, D), f32)
    assert products.calls == [("wide", (20, V), f32), add, ("wide", (10, V), f32), add]


# --- products: cuBLAS is not here, its calls are ------------------------------------------------------------


class CublasOverloads(TorchDispatchMode):
    """Answers the overloads that exist on CUDA alone, as their schemas say; optionally as an older torch does."""

    def __init__(self, mixed_addmm: bool) -> None:
        super().__init__()
        self.mixed_addmm, self.calls = mixed_addmm, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten, kwargs = torch.ops.aten, kwargs or {}
        self.calls.append(func)
        if func == aten.mm.dtype_out:
            assert args[2] == kwargs["out"].dtype == torch.float32
            return kwargs["out"].copy_(args[0].float() @ args[1].float())
        if func == aten.mm.dtype:
            return args[0].float() @ args[1].float()
        if func == aten.addmm.dtype_out:
            if not self.mixed_addmm:
                raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
            return kwargs["out"].copy_(args[0] + args[1].float() @ args[2].float())
        return func(*args, **kwargs)


@pytest.mark.parametrize("mixed_addmm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_library_products(mixed_addmm: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_products, "BLOCK_BYTES", 4 * 5 * 4)  # blocks of four rows, a ragged last one
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator).to(dtype) for shape in ((11, 7), (7, 5)))
    exact = left.double() @ right.double()
    products, total, narrow = (
        cuda_products.LibraryProducts(),
        torch.empty(11, 9)[:, :5],
        torch.empty(11, 5, dtype=dtype),
    )
    with CublasOverloads(mixed_addmm) as overloads:
        products.wide(left, right, total)
        products.add(total, left, right)
        products.add(total, left, right)
        products.rounded(left, right, narrow)
    assert error(total, 3 * exact) <= FP32
    assert error(narrow, exact) <= (FP32 if dtype == torch.float32 else torch.finfo(dtype).eps)
    refused = overloads.calls.count(torch.ops.aten.addmm.dtype_out)
    assert refused == (0 if dtype == torch.float32 else 2 if mixed_addmm else 1)  # asked once


def test_library_products_through_the_ops() -> None:
    """float32 products run here too: results in place although the inputs require grad."""
    backends.register_backend("cuda_on_cpu", CudaBackend(kernels_for, cuda_products.LibraryProducts()))
    p = make_problem()
    inputs = (p.hidden, p.weight, p.task_weights)
    expected = reference_linear_task_cross_entropy(*p.tensors)
    for recompute in (False, True):
        assert_same(linear_loss(*p.tensors, chunk_size=7, recompute=recompute), expected, inputs)
    into = torch.zeros(p.weight.shape)
    linear_loss(*p.tensors, chunk_size=7, grad_weight_out=into).loss.backward()
    assert error(into, torch.autograd.grad(expected.loss, p.weight)[0]) <= FP32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opcheck(dtype: torch.dtype) -> None:
    """What comes back has the shapes, strides and aliases that the ops promise to a compiler."""
    p = make_problem((2, 6), D=8, V=11, K=3, dtype=dtype)
    (hidden, weight, bias, where, *rows), targets, lam = arguments(p)
    hidden.requires_grad_()
    spec, end, every = (0.0, 0.1, 0.01, 0.7, 0.1 / 11), (5, "cuda_on_cpu"), (True,) * 3
    grad, stats, logits = torch.rand(12), torch.rand(2, 12), torch.randn(12, 11).to(dtype).requires_grad_()
    backward = (grad, hidden.detach(), weight, bias, where, *rows, stats)
    for op, args in (
        (ops.linear_task_ce, (hidden, weight, bias, where, targets.tasks_M, *rows, lam, every, spec, *end)),
        (ops.scale_gradient, (weight, torch.tensor(3.0), torch.float32, "cuda_on_cpu")),
        (ops.scale_gradient_, (weight.detach().clone(), torch.tensor(3.0), "cuda_on_cpu")),
        (ops.linear_task_ce_rows_backward, (*backward, None, every, spec, *end, torch.float32)),
        (ops.linear_task_ce_rows_backward, (*backward, torch.zeros(11, 8), every, spec, *end, dtype)),
        (ops.task_ce_rows, (logits, where, spec, *end)),
        (ops.task_ce_rows_backward, (grad, logits.detach(), where, stats, spec, *end)),
    ):
        torch.library.opcheck(op, args)


def test_the_whole_backend_calls_products_as_cublas_takes_them() -> None:
    p = make_problem(dtype=torch.bfloat16)
    problem, targets, lam = arguments(p)
    found = []
    for products in (WideningProducts(), cuda_products.LibraryProducts()):
        backend = CudaBackend(kernels_for, products)
        with CublasOverloads(True):
            found.append(backend.linear_forward(problem, targets.tasks_M, lam, (True,) * 3, TokenLoss(), 7))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_settings_of_cublas_are_restored() -> None:
    settings = torch.backends.cuda.matmul
    name = "allow_bf16_reduced_precision_reduction"
    during = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            during.append(getattr(settings, name))
            return func(*args, **(kwargs or {}))

    left, out = torch.ones(2, 2), torch.empty(2, 2)
    for before in (True, False):
        setattr(settings, name, before)
        with Look():
            cuda_products.LibraryProducts().rounded(left, left, out)
        assert getattr(settings, name) == before
    setattr(settings, name, True)
    assert during == [False, False]


def test_the_module_is_a_backend() -> None:
    """Everything the protocol asks for, and nothing compiled by importing it."""
    names = {name for name in vars(Backend) if not name.startswith("_")}
    assert {name for name in names if callable(getattr(cuda_backend, name, None))} == names


@pytest.mark.parametrize("into", [False, True])
def test_sums_over_chunks_are_rounded_once(into: bool) -> None:
    """dW and db of 16-bit inputs, and dW added to a 16-bit buffer: float32 until all chunks are in."""
    generator = torch.Generator().manual_seed(0)
    dlogits, hidden, weight = (
        torch.randn(*size, generator=generator).bfloat16() for size in ((12, 9), (12, 5), (9, 5))
    )
    buffer, before = (weight.clone(), weight.double()) if into else (None, torch.zeros(9, 5).double())
    dtypes = (torch.bfloat16,) * 3
    sums = cuda_gradients.LinearGradients(WideningProducts(), hidden, weight, (True,) * 3, dtypes, None, buffer)
    for rows in torch.arange(12).split(4):
        sums.add(cuda_gradients.Chunk(int(rows[0]), rows, hidden[rows], torch.empty(0), dlogits[rows], False))
    _, grad_weight, grad_bias = sums.rounded()
    exact = before + dlogits.double().t() @ hidden.double()
    for found, wanted in ((buffer if into else grad_weight, exact), (grad_bias, dlogits.double().sum(0))):
        assert found is not None
        assert found.dtype == torch.bfloat16
        # One rounding of its own value; float32 sums of a few terms of order one.
        assert bool(
            ((found.double() - wanted).abs() <= torch.finfo(torch.bfloat16).eps / 2 * wanted.abs() + 1e-5).all()
        )


def test_lifts_are_powers_of_two_however_small_the_gradient() -> None:
    for largest in (1e25, 1.0, 1e-38, 1e-45, 0.0):
        lift = cuda_gradients.lift_for(torch.tensor([0.0, -largest]), torch.float16, 0.5)
        assert lift is not None
        assert float(lift.up) > 0
        assert float(lift.up) * float(lift.down) == 1
        assert float(lift.up) * largest * 0.5 < 16
