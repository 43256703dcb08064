"""The torch.library ops: opcheck, torch.compile, checkpointing, autocast, backends."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_problems import FP32, Problem, error, make_problem
from torch.utils.checkpoint import checkpoint

from cotbal_kernels import (
    TaskLoss,
    backends,
    linear_task_cross_entropy,
    logits_ops,
    ops,
    portable,
    task_cross_entropy,
    task_ops,
)
from cotbal_kernels.cuda_kernels import library
from cotbal_kernels.reference import reference_linear_task_cross_entropy


def flat(p: Problem) -> tuple[torch.Tensor, ...]:
    """hidden_MD (a leaf), targets_M, tasks_M, rows_N and num_rows."""
    labels_M = p.labels.flatten()
    ones = torch.ones(len(p.task_weights))
    prepared = portable.prepare_targets(
        labels_M, p.task_ids.flatten(), ones, p.weight.shape[0], -100, True, False, len(labels_M)
    )
    hidden_MD = p.hidden.detach().flatten(0, 1).requires_grad_()
    return hidden_MD, prepared.targets_M, prepared.tasks_M, prepared.rows_N, prepared.num_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype: torch.dtype) -> None:
    """Schema, fake kernels and autograd registration of every op agree with what it does."""
    p = make_problem((2, 6), D=8, V=11, K=3, dtype=dtype)
    hidden, targets, tasks, *rows = flat(p)
    grad, stats, scale = torch.rand(12), torch.rand(2, 12), p.task_weights.detach().clone().requires_grad_()
    weight, bias, spec, end = p.weight, p.bias, (0.0, 0.1, 0.01, 1.5, 0.1 / 11), (5, "portable")
    frozen = weight.detach()
    logits = (hidden @ frozen.t()).detach().requires_grad_()
    labels = p.labels.flatten()
    backward = (grad, hidden.detach(), frozen, None, targets, *rows, stats)
    samples = [
        (task_ops.prepare_targets, (labels, tasks, scale.detach(), 11, -100, True, False, 12, "portable")),
        (task_ops.task_scales, (scale, torch.arange(3), torch.zeros(()), None, False, "portable")),
        (
            task_ops.task_scales,
            (scale, torch.arange(3), torch.zeros(()), stats[0, :3].clone().requires_grad_(), True, "portable"),
        ),
        (task_ops.apart, (stats[0].clone().requires_grad_(),)),
        (task_ops.task_sums, (stats[0].clone().requires_grad_(), targets.abs(), tasks, 3, "portable")),
        (ops.linear_task_ce, (hidden, weight, bias, targets, tasks, *rows, scale, (True,) * 3, spec, *end)),
        (ops.linear_task_ce, (hidden, frozen, None, targets, tasks, *rows, scale, (True, False, False), spec, *end)),
        (ops.scale_gradient, (frozen, torch.tensor(3.0), torch.float32, "portable")),
        (ops.scale_gradient_, (frozen.clone(), torch.tensor(3.0), "portable")),
        (ops.linear_task_ce_rows, (hidden, weight, bias, targets, *rows, None, spec, *end)),
        (ops.linear_task_ce_rows_backward, (*backward, None, (True, False, True), spec, *end, torch.float32)),
        (ops.linear_task_ce_rows_backward, (*backward, torch.zeros(11, 8), (True,) * 3, spec, *end, dtype)),
        (logits_ops.task_ce_rows, (logits, targets, spec, *end, False)),
        (logits_ops.task_ce_rows_backward, (grad, logits.detach(), targets, stats, spec, *end)),
        (logits_ops.task_ce_rows_backward_, (grad, logits.detach().clone(), targets, stats, spec, *end)),
    ]
    for op, arguments in samples:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_gradients_of_the_scales_of_tasks(per_task: bool, own: bool) -> None:
    """Those of lambda and of a normalizer that has one, against autograd in float64; an absent task, and one of 0."""
    lam, tokens = torch.tensor([0.5, 2.0, 3.0, 0.0]), torch.tensor([7, 0, 2, 5])
    normalizer = torch.tensor([4.0, 0.0, 9.0, 3.0]) if per_task else torch.tensor(11.0)
    leaves = [lam.requires_grad_()] if own else [lam.requires_grad_(), normalizer.requires_grad_()]
    poison, upstream = torch.zeros(()), torch.tensor([1.0, -2.0, 0.3, 4.0])
    scale, _ = task_ops.task_scales(lam, tokens, poison, None if own else normalizer, per_task, "portable")
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    terms = []
    for task in range(4):
        given = None if own else wide[1][task] if per_task else wide[1]
        if per_task and own:
            given = tokens[task] * wide[0][tokens > 0].sum()
        n = (wide[0] * tokens).sum() if given is None else given
        if float(n.detach()):
            terms.append(upstream[task] * wide[0][task] / n)
    found = torch.autograd.grad(scale, leaves, upstream, retain_graph=True)
    for a, b in zip(found, torch.autograd.grad(torch.stack(terms).sum(), wide), strict=True):
        assert error(a, b) <= 1e-6
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(scale, leaves, upstream, create_graph=True)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_that_waited_is_handed_over(dtype: torch.dtype, factor: float) -> None:
    """``backward()`` makes no second V x D: the memory is that of the forward pass, whatever comes upstream.

    float16 waits in float32, so there its gradient has to be another tensor.
    """
    p = make_problem((2, 6), D=8, V=11, K=3, dtype=dtype)
    hidden, targets, tasks, *rows = flat(p)
    inputs = (hidden, p.weight, p.bias, targets, tasks, *rows, p.task_weights)
    loss, *_, grad_weight, _ = ops.linear_task_ce(*inputs, (True,) * 3, (0.0,) * 3, 5, "portable")
    waits, place = grad_weight.clone(), grad_weight.data_ptr()
    del grad_weight, _
    (factor * loss).backward()
    assert (p.weight.grad.data_ptr() == place) == (dtype != torch.float16)
    assert torch.equal(p.weight.grad, (waits.float() * factor).to(dtype))
    assert p.hidden.grad is None
    assert hidden.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scaling_in_place(dtype: torch.dtype) -> None:
    """The values of scaling into another tensor; a factor of 1 does not even write."""
    grad = torch.randn(37, 11, dtype=torch.float64).to(dtype)
    scaled, untouched = grad.clone(), grad.clone()
    ops.scale_gradient_(scaled, torch.tensor(0.7), "portable")
    assert torch.equal(scaled, ops.scale_gradient(grad, torch.tensor(0.7), dtype, "portable"))
    ops.scale_gradient_(untouched, torch.tensor(1.0), "portable")
    assert torch.equal(untouched, grad)


@pytest.mark.parametrize("aggregation", ["token", "none"])
def test_compile_fullgraph(aggregation: str) -> None:
    """One graph, forward and backward, same values; on a second batch of other labels without recompiling."""
    torch._dynamo.reset()
    p = make_problem()

    def loss(hidden, weight, labels, lam):
        out = linear_task_cross_entropy(
            hidden, weight, labels, p.task_ids, lam, shift=True, aggregation=aggregation, chunk_size=7
        )
        return out.loss.sum() * 2, out.task_loss, out.task_tokens

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = (p.hidden, p.weight, p.task_weights)
    for labels in (p.labels, p.labels.flip(0).clone(), torch.full_like(p.labels, -100)):
        expected = loss(p.hidden, p.weight, labels, p.task_weights)
        with torch._dynamo.config.patch(error_on_recompile=labels is not p.labels):
            actual = compiled(p.hidden, p.weight, labels, p.task_weights)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(torch.autograd.grad(actual[0], inputs), torch.autograd.grad(expected[0], inputs), strict=True):
            assert error(a, b) <= FP32


def test_statistics_of_a_graph_summed_over_ranks_before_its_backward_pass() -> None:
    """As in eager mode: a compiler may not put off the copies that the gradient of lambda needs."""
    torch._dynamo.reset()
    p = make_problem()

    def both(lam: torch.Tensor) -> tuple[TaskLoss, TaskLoss]:
        tensors = (p.hidden.detach(), p.weight.detach(), p.labels, p.task_ids, lam)
        return linear_task_cross_entropy(*tensors), linear_task_cross_entropy(*tensors, recompute=True)

    outs = torch.compile(both, fullgraph=True, backend="aot_eager")(p.task_weights)
    wanted = torch.autograd.grad(reference_linear_task_cross_entropy(*p.tensors).loss, p.task_weights)[0]
    for out in outs:
        for statistic in (out.task_loss, out.task_tokens, out.task_correct, out.lse):
            statistic.data.mul_(3)
    for out in outs:
        (found,) = torch.autograd.grad(out.loss, p.task_weights, retain_graph=True)
        assert error(found, wanted) <= FP32


def test_compile_with_a_number_that_changes_from_step_to_step() -> None:
    """The second value makes the normalizer an input of the graph; no other one compiles again."""
    torch._dynamo.reset()
    p = make_problem()
    compiled = torch.compile(
        lambda hidden, normalizer: linear_task_cross_entropy(hidden, *p.tensors[1:], normalizer=normalizer).loss,
        fullgraph=True,
        backend="aot_eager",
    )
    for step, normalizer in enumerate((3.0, 5.0, 7.5, 11.25)):
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            found = compiled(p.hidden, normalizer)
        wanted = reference_linear_task_cross_entropy(*p.tensors, normalizer=normalizer)
        assert error(found, wanted.loss) <= FP32
        (actual,) = torch.autograd.grad(found, p.hidden)
        assert error(actual, torch.autograd.grad(wanted.loss, p.hidden)[0]) <= FP32


@pytest.mark.parametrize("options", [{"chunk_size": 7}, {"recompute": True}, {"differentiable_tasks": True}, None])
def test_compile_with_batches_of_other_shapes(options: dict[str, Any] | None) -> None:
    """As of a collator that pads to the longest sample: the second shape makes sizes symbols, no other compiles again.

    ``None`` stands for logits that exist.
    """
    torch._dynamo.reset()

    def loss(hidden, weight, labels, tasks, lam):
        if options is None:
            return task_cross_entropy(hidden @ weight.t(), labels, tasks, lam, shift=True).loss
        return linear_task_cross_entropy(hidden, weight, labels, tasks, lam, shift=True, **options).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for step, shape in enumerate([(3, 17), (2, 9), (5, 33), (4, 6), (7, 9)]):
        p = make_problem(shape)
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            found = compiled(*p.tensors)
        wanted = reference_linear_task_cross_entropy(*p.tensors, shift=True).loss
        eager = loss(*p.tensors)
        assert error(found, wanted) <= FP32
        inputs = (p.hidden, p.weight, p.task_weights)
        found, wanted, eager = (torch.autograd.grad(value, inputs) for value in (found, wanted, eager))
        assert all(error(a, b) <= FP32 for a, b in zip(found[:2], wanted[:2], strict=True))
        assert torch.equal(found[2], eager[2])  # a difference of sums, of which float32 leaves fewer digits


def test_compile_of_existing_logits() -> None:
    torch._dynamo.reset()
    p = make_problem()
    logits = (p.hidden @ p.weight.t()).detach().requires_grad_()

    def loss(logits, lam):
        return task_cross_entropy(logits, p.labels, p.task_ids, lam, aggregation="task").loss

    actual = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, p.task_weights)
    expected = loss(logits, p.task_weights)
    assert torch.equal(actual, expected)
    a, b = (torch.autograd.grad(value, logits)[0] for value in (actual, expected))
    assert error(a, b) <= FP32


def test_errors_of_values_come_through_compile() -> None:
    torch._dynamo.reset()
    p = make_problem()
    p.labels[1, 2] = 67

    def loss(hidden):
        return linear_task_cross_entropy(hidden, *p.tensors[1:]).loss

    with pytest.raises(Exception, match=r"labels must be in \[0, 67\) where supervised, got 67"):
        torch.compile(loss, fullgraph=True, backend="aot_eager")(p.hidden)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    """And saved tensors that wait on the host."""
    p = make_problem()

    def loss(hidden, weight):
        return linear_task_cross_entropy(hidden * 2, weight, *p.tensors[2:]).loss

    inputs = (p.hidden, p.weight)
    wanted = torch.autograd.grad(loss(*inputs), inputs)
    checkpoint(loss, *inputs, use_reentrant=use_reentrant).backward()
    assert torch.equal(p.hidden.grad, wanted[0])
    assert torch.equal(p.weight.grad, wanted[1])
    with torch.autograd.graph.save_on_cpu():
        offloaded = loss(*inputs)
    for a, b in zip(torch.autograd.grad(offloaded * 2, inputs), wanted, strict=True):
        assert torch.equal(a, 2 * b)


@pytest.mark.parametrize("rows", [False, True])
def test_autocast_casts_as_linear_does(rows: bool) -> None:
    """Same values as casting by hand, float32 gradients; nothing inside the op is cast again."""
    p = make_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(p.hidden, p.weight).dtype == torch.bfloat16  # what users expect
        out = linear_task_cross_entropy(*p.tensors, bias=p.bias, differentiable_tasks=rows)
    by_hand = linear_task_cross_entropy(
        p.hidden.bfloat16(),
        p.weight.bfloat16(),
        *p.tensors[2:],
        bias=p.bias.bfloat16(),
        differentiable_tasks=rows,
    )
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.loss, by_hand.loss)
    plain = linear_task_cross_entropy(*p.tensors, bias=p.bias)
    assert not torch.equal(out.loss, plain.loss)
    inputs = (p.hidden, p.weight, p.bias)
    for a, b in zip(torch.autograd.grad(out.loss, inputs), torch.autograd.grad(by_hand.loss, inputs), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [False, True])
def test_backends_run_outside_autocast(rows: bool) -> None:
    """A backend's own float32 products must not be cast, in the forward or the backward pass."""
    seen = []

    def watched(function):
        def wrapper(*args):
            seen.append((function.__name__, torch.is_autocast_enabled("cpu")))
            return function(*args)

        return wrapper

    names = [name for name in dir(backends.Backend) if not name.startswith("_")]
    watching = SimpleNamespace(**{name: watched(getattr(portable, name)) for name in names})
    backends.register_backend("watching", watching)
    p = make_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_task_cross_entropy(*p.tensors, backend="watching", differentiable_tasks=rows)
        out.loss.backward()
    del backends.BACKENDS["watching"]
    computed = [enabled for name, enabled in seen if name.startswith("linear")]
    assert computed == [False] * (2 if rows else 1)


def test_autocast_accepts_mixed_dtypes_and_logits() -> None:
    p = make_problem()
    wanted = reference_linear_task_cross_entropy(p.hidden.bfloat16(), p.weight.bfloat16(), *p.tensors[2:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = linear_task_cross_entropy(p.hidden.bfloat16(), *p.tensors[1:])
        logits = task_cross_entropy((p.hidden.float() @ p.weight.t()), *p.tensors[2:])
        wide = linear_task_cross_entropy(p.hidden.double(), p.weight.double(), *p.tensors[2:])  # autocast leaves it
    assert error(mixed.loss, wanted.loss) <= FP32
    assert error(wide.loss, reference_linear_task_cross_entropy(*p.tensors).loss) <= 1e-7  # lambda is float32
    # bf16 logits out of autocast: each off by 2^-9 of values up to 4, averaged over 30 tokens.
    assert error(logits.loss, wanted.loss) <= 2e-3


def test_no_grad_returns_a_plain_tensor(problem: Problem) -> None:
    with torch.no_grad():
        out = linear_task_cross_entropy(*problem.tensors)
    assert not out.loss.requires_grad
    with torch.inference_mode():
        assert torch.equal(linear_task_cross_entropy(*problem.tensors).loss, out.loss)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_gpu_backends_say_what_is_missing(problem: Problem, backend: str) -> None:
    with pytest.raises(ValueError, match=f"{backend}.*cannot run here: .*CUDA"):
        linear_task_cross_entropy(*problem.tensors, backend=backend)
    with pytest.raises(ValueError, match=r"backend='magic' does not exist; .*'cuda', 'portable', 'triton'"):
        linear_task_cross_entropy(*problem.tensors, backend="magic")


def test_the_device_of_the_tensors_decides_and_not_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two generations in one machine, the current one too old: it is asked last if at all."""
    pytest.importorskip("triton")
    capabilities = {0: (7, 5), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device=0: capabilities[getattr(device, "index", device)]
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(library, "_prebuilt", lambda: object())
    monkeypatch.setattr(backends, "_reasons", {})
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))
    old, new = torch.device("cuda", 0), torch.device("cuda", 1)
    for name in ("triton", "cuda"):
        backends.check_backend_name(name)  # some device can
        for _ in range(2):  # what runs on one device says nothing about the other
            assert backends.resolve_backend(name, new) == name
            with pytest.raises(ValueError, match=f"backend='{name}' cannot run on cuda:0: .*compute capability"):
                backends.resolve_backend(name, old)
        with pytest.raises(ValueError, match=f"backend='{name}' needs tensors on a CUDA device, got cpu"):
            backends.resolve_backend(name, torch.device("cpu"))
    assert backends.resolve_backend("auto", torch.device("cpu")) == "portable"
    assert backends.resolve_backend("auto", new) == "triton"
    assert backends.resolve_backend("auto", old) == "portable"
    monkeypatch.setattr(torch.cuda, "get_device_capability", None)  # and is not asked at every step
    assert backends.resolve_backend("auto", old) == "portable"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "_reasons", {})
    monkeypatch.setattr(torch.version, "hip", "7.0")  # a "CUDA device" of ROCm
    assert backends.resolve_backend("auto", new) == "portable"
    asked: list[tuple[int, int]] = []
    library.load.cache_clear()
    monkeypatch.setattr(library, "_load", functools.cache(asked.append))
    library.load(new)
    assert asked == [(9, 0)]
    library.load.cache_clear()


def test_environment_takes_the_place_of_auto(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "DEFAULT", "magic")
    with pytest.raises(ValueError, match="backend='magic' does not exist"):
        linear_task_cross_entropy(*problem.tensors)
    monkeypatch.setattr(backends, "DEFAULT", "reference")
    with pytest.raises(ValueError, match="COTBAL_BACKEND must be a backend to train with"):
        linear_task_cross_entropy(*problem.tensors)
    linear_task_cross_entropy(*problem.tensors, backend="portable")
