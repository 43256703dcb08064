"""What a training step needs of the loss on a GPU: determinism, CUDA graphs, no host waits, compile, streams.

On a CPU those that need no device are rehearsed, see gpu_case.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_case import (
    ALL,
    BACKENDS,
    DEVICE,
    ON_GPU,
    SIZES,
    gpu_problem,
    gradients,
    needs_gpu,
    rehearsal,  # noqa: F401 (a fixture)
    require,
)
from loss_problems import Problem, error
from torch import Tensor

from cotbal_kernels import linear_task_cross_entropy, logits_ops, ops, task_cross_entropy, task_ops

pytestmark = pytest.mark.gpu

MODES: list[dict[str, Any]] = [
    {"chunk_size": SIZES.chunk},
    {"recompute": True, "chunk_size": SIZES.chunk},
    {"aggregation": "none", "normalizer": 1000.0, "chunk_size": SIZES.chunk, **ALL},
]


def name(options: dict[str, Any]) -> str:
    return "+".join(options)


def problem(backend: str, **kwargs: Any) -> Problem:
    sizes = {"D": SIZES.D, "V": 4003 if ON_GPU else SIZES.V}
    return gpu_problem(SIZES.shape, **{**sizes, "dtype": torch.bfloat16, "ignored": 0.2, **kwargs})


def step(p: Problem, labels: torch.Tensor, backend: str, options: dict[str, Any]) -> list[torch.Tensor]:
    """Everything a training step computes: loss, sums per task, and every gradient."""
    arguments = (p.hidden, p.weight, labels, p.task_ids, p.task_weights)
    out = linear_task_cross_entropy(*arguments, bias=p.bias, backend=backend, **options)
    inputs = [p.hidden, p.weight, p.bias, p.task_weights]
    found = gradients(out.loss, inputs)
    return [out.loss.detach(), out.task_loss.detach(), out.task_tokens, out.task_correct, out.lse, *found]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", MODES, ids=name)
def test_ten_runs_are_bitwise_the_same(backend: str, options: dict[str, Any]) -> None:
    """The gradient of lambda among them."""
    require(backend)
    p = problem(backend)
    first = step(p, p.labels, backend, options)
    for _ in range(9 if ON_GPU else 1):
        for a, b in zip(step(p, p.labels, backend, options), first, strict=True):
            assert torch.equal(a, b)


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", MODES, ids=name)
def test_no_host_synchronisation(backend: str, options: dict[str, Any]) -> None:
    require(backend)
    p = problem(backend)
    wanted = step(p, p.labels, backend, options)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(p, p.labels, backend, options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", MODES, ids=name)
def test_cuda_graph_replays_with_other_labels(backend: str, options: dict[str, Any]) -> None:
    """Forward and backward of one capture serve any number of supervised positions, none included."""
    require(backend)
    p = problem(backend)
    labels = p.labels.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(p, labels, backend, options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(p, labels, backend, options)
    fewer = torch.where(torch.arange(111, device="cuda") % 9 == 0, p.labels, -100)
    for others in (p.labels.flip(0), fewer, torch.full_like(labels, -100), p.labels.abs() % 4003):
        labels.copy_(others)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(found, step(p, others.clone(), backend, options), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"aggregation": "none"}, *[{"recompute": True}] * ON_GPU], ids=name)
def test_compile_in_one_graph(backend: str, options: dict[str, Any]) -> None:
    """Inductor, forward and backward; other labels of the same shape do not compile again.

    Sums that callers change in place between the two, without a word to autograd, change no gradient.
    """
    require(backend)
    torch._dynamo.reset()
    p = problem(backend)

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        arguments = (hidden * 2, weight, labels, p.task_ids, lam)
        out = linear_task_cross_entropy(*arguments, shift=True, backend=backend, **options)
        return out.loss * 3, out.task_loss, out.task_tokens

    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    inputs = [p.hidden, p.weight, p.task_weights]
    for labels in (p.labels, p.labels.flip(0).contiguous()):
        with torch._dynamo.config.patch(error_on_recompile=labels is not p.labels):
            actual, *sums = compiled(p.hidden, p.weight, labels, p.task_weights)
        expected, *_ = loss(p.hidden, p.weight, labels, p.task_weights)
        for one in sums:
            one.data.mul_(3)
        assert error(actual, expected) <= 1e-6
        for a, b in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
            # The same kernels; what is around them may be fused, and round elsewhere.
            assert error(a, b) <= 2**-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    """Schema, fake kernels and autograd registration of every op agree with what it does on this device."""
    require(backend)
    p = gpu_problem((12,), D=16, V=24, K=3, dtype=torch.bfloat16)
    ones, lam = torch.ones(3, device=DEVICE), p.task_weights.detach().clone().requires_grad_()
    prepared = task_ops.prepare_targets(p.labels, p.task_ids, ones, 24, -100, True, False, 12, backend)
    targets, tasks, tokens, poison, rows, count = prepared
    spec, end, frozen = (0.0, 0.1, 0.01, 1.5, 0.1 / 24), (5, backend), p.weight.detach()
    stats = torch.rand(2, 12, device=DEVICE)
    backward = (torch.rand(12, device=DEVICE), p.hidden.detach(), frozen, None, targets, rows, count, stats)
    buffer = torch.zeros(24, 16, device=DEVICE)
    logits = (p.hidden @ p.weight.t()).detach().requires_grad_()
    common = (targets, rows, count)
    samples = [
        (task_ops.prepare_targets, (p.labels, p.task_ids, ones, 24, -100, True, False, 12, backend)),
        (task_ops.task_scales, (lam, tokens, poison, None, False, backend)),
        (task_ops.task_scales, (lam, tokens, poison, stats[0, :3].clone().requires_grad_(), True, backend)),
        (task_ops.task_sums, (stats[0].clone().requires_grad_(), targets.abs(), tasks, 3, backend)),
        (ops.linear_task_ce, (p.hidden, p.weight, p.bias, targets, tasks, rows, count, lam, (True,) * 3, spec, *end)),
        (
            ops.linear_task_ce,
            (p.hidden, frozen, None, targets, tasks, rows, count, lam, (True, False, False), spec, *end),
        ),
        (ops.scale_gradient, (frozen, torch.tensor(3.0, device=DEVICE), torch.float32, backend)),
        (ops.scale_gradient_, (frozen.clone(), torch.tensor(3.0, device=DEVICE), backend)),
        (ops.linear_task_ce_rows, (p.hidden, p.weight, p.bias, *common, None, spec, *end)),
        (ops.linear_task_ce_rows_backward, (*backward, None, (True, False, True), spec, *end, torch.float32)),
        (ops.linear_task_ce_rows_backward, (*backward, buffer, (True, True, False), spec, *end, torch.bfloat16)),
        (logits_ops.task_ce_rows, (logits, targets, spec, *end, False)),
        (logits_ops.task_ce_rows_backward, (backward[0], logits.detach(), targets, stats, spec, *end)),
        (logits_ops.task_ce_rows_backward_, (backward[0], logits.detach().clone(), targets, stats, spec, *end)),
    ]
    for op, arguments in samples:
        torch.library.opcheck(op, arguments)


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", MODES[:2], ids=name)
def test_on_another_stream(backend: str, options: dict[str, Any]) -> None:
    """Everything is launched on the current stream: the inputs are produced there, late."""
    require(backend)
    p = problem(backend)
    wanted = step(p, p.labels, backend, options)
    ready = p.hidden.detach().clone()
    slow = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        p.hidden.data.fill_(float("nan"))
        for _ in range(20):
            slow = slow @ slow
            slow = slow / slow.norm()
        p.hidden.data.copy_(ready + 0 * slow[0, 0].nan_to_num())
        found = step(p, p.labels, backend, options)
    side.synchronize()
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", MODES, ids=name)
def test_on_another_device_than_the_current_one(backend: str, options: dict[str, Any]) -> None:
    require(backend)
    p = problem(backend)
    moved = {name: value.detach().to("cuda:1").requires_grad_(value.requires_grad) for name, value in vars(p).items()}
    p = Problem(**moved)
    with torch.cuda.device(1):
        wanted = step(p, p.labels, backend, options)
    with torch.cuda.device(0):
        found = step(p, p.labels, backend, options)
        assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", MODES[:2], ids=name)
def test_autocast_is_casting_by_hand(backend: str, options: dict[str, Any]) -> None:
    require(backend)
    p = problem(backend, dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = linear_task_cross_entropy(*p.tensors, bias=p.bias, backend=backend, **options)
    cast = [tensor.to(torch.bfloat16) for tensor in (p.hidden, p.weight, p.bias)]
    by_hand = linear_task_cross_entropy(*cast[:2], *p.tensors[2:], bias=cast[2], backend=backend, **options)
    assert torch.equal(found.loss, by_hand.loss)
    inputs = [p.hidden, p.weight, p.bias]
    for a, b in zip(gradients(found.loss, inputs), gradients(by_hand.loss, inputs), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_survives_a_late_loss_scale(backend: str) -> None:
    require(backend)
    p = problem(backend, dtype=torch.float16, V=SIZES.V)
    scale = 65536.0
    expected = linear_task_cross_entropy(*p.tensors, normalizer=1e6, backend="reference")
    found = linear_task_cross_entropy(*p.tensors, normalizer=1e6, chunk_size=SIZES.chunk, backend=backend)
    inputs = (p.hidden, p.weight)
    wanted = torch.autograd.grad(expected.loss * scale, inputs)
    for a, b in zip(torch.autograd.grad(found.loss * scale, inputs), wanted, strict=True):
        # Both are rounded to float16; the gradient of the logits may be too.
        assert error(a, b) <= 3 * 2**-11 + 2**-24 / float(b.abs().max())


@needs_gpu
def test_memory_beside_inputs_and_outputs_is_bounded(big_memory: Callable[[float], None]) -> None:
    """A head of 1.05 GB and logits of 0.8 GB: beside dX and dW there is a workspace, neither N x V nor V x D.

    In the backward pass too: dW is handed over, and only the narrow dX comes beside the one that waited.
    """
    require("triton")
    big_memory(6)
    M, width, vocab_size = 3072, 4096, 128_256
    hidden = torch.randn(M, width, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocab_size, width, device="cuda") / 64).bfloat16().requires_grad_()
    labels = torch.randint(vocab_size, (M,), device="cuda")
    tasks, lam = torch.zeros_like(labels), torch.ones(1, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = linear_task_cross_entropy(hidden, weight, labels, tasks, lam, backend="triton", chunk_size=512)
    out.loss.backward()
    assert bool(torch.isfinite(out.loss))
    outputs = (4 + 2) * M * width + 2 * vocab_size * width
    packed, statistics = 2 * M * width, 8 * M * (vocab_size // 128 + 1)
    # 512 rows of logits in 16 bits, or as much of all rows; 16 MiB of small change.
    assert (
        torch.cuda.max_memory_allocated() - before <= outputs + packed + statistics + 2 * 512 * vocab_size * 1.1 + 2**24
    )


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_existing_logits_in_a_graph(backend: str) -> None:
    require(backend)
    p = problem(backend)
    logits = (p.hidden @ p.weight.t()).detach().requires_grad_()
    labels = p.labels.clone()

    def run(targets: torch.Tensor) -> list[torch.Tensor]:
        out = task_cross_entropy(logits, targets, p.task_ids, p.task_weights, backend=backend)
        return [out.loss.detach(), *gradients(out.loss, [logits])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(labels)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(labels)
    labels.copy_(p.labels.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(found, run(p.labels.flip(0).contiguous()), strict=True):
        assert torch.equal(a, b)
