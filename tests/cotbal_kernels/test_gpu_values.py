"""Losses and gradients on a GPU, with tiles of real size: ``pytest -m gpu``. On a CPU a rehearsal, see gpu_case."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_case import (
    ALL,
    ALL_BACKENDS,
    BACKENDS,
    DEVICE,
    ON_GPU,
    SIZES,
    assert_gradients,
    exact_and_ordinary,
    gpu_problem,
    gradients,
    needs_gpu,
    rehearsal,  # noqa: F401 (a fixture)
    require,
    sizes_for,
)
from loss_problems import error
from vocabulary_shards import check_shards

from cotbal_kernels import backends, linear_task_cross_entropy, task_cross_entropy
from cotbal_kernels.reference import reference_task_cross_entropy
from cotbal_kernels.triton_kernels import head

pytestmark = pytest.mark.gpu

SHAPE, D, V, MANY, CHUNK = SIZES
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Case = tuple[torch.dtype, bool, bool, dict[str, Any]]  # type, many words, bias, options
EVERYWHERE: list[Case] = [
    (BF16, False, False, {}),
    (BF16, False, True, {"chunk_size": CHUNK, "aggregation": "sum", **ALL}),
    (BF16, True, False, {"recompute": True, "chunk_size": CHUNK}),
    (FP16, True, True, {"chunk_size": CHUNK}),
    (FP32, False, True, {"chunk_size": CHUNK}),
    # kept in dW's memory in 12 bits, the rows that have no room there computed again
    (BF16, False, True, {"chunk_size": CHUNK, "logit_softcap": 5.0, "aggregation": "task"}),
]
# Each generation has products of its own, by type; sm_89 has sm_80's on other tiles.
OTHER_GENERATIONS = {
    "sm_80": [EVERYWHERE[2], EVERYWHERE[4], EVERYWHERE[5]],
    "sm_89": [EVERYWHERE[0], EVERYWHERE[4]],
    "sm_100": [EVERYWHERE[3], EVERYWHERE[4], EVERYWHERE[5]],
}
CASES: list[Case] = [
    (BF16, True, True, {"chunk_size": CHUNK}),
    (BF16, True, False, {"chunk_size": CHUNK, "label_smoothing": 0.1}),
    (BF16, False, False, {"aggregation": "none", **ALL}),
    (BF16, True, False, {"chunk_size": CHUNK, "logit_scale": 0.0625}),
    (BF16, False, True, {"aggregation": "none", "logit_scale": 1.3, **ALL}),
    (FP16, False, False, {}),
    (FP16, False, False, {"aggregation": "none", "label_smoothing": 0.1}),
    (FP16, False, False, {"chunk_size": CHUNK, "logit_scale": 0.7}),
    (FP32, True, False, {"chunk_size": CHUNK}),
    (FP32, False, False, {"aggregation": "none", **ALL}),
]


def name(case: Any) -> str | None:
    if isinstance(case, torch.dtype):
        return str(case).removeprefix("torch.")
    return "+".join(case) or "plain" if isinstance(case, dict) else None


def own(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in ("chunk_size", "recompute", "max_tokens")}


@pytest.mark.parametrize(
    ("backend", "dtype", "many", "with_bias", "options"),
    [
        (backend, *case)
        for case in EVERYWHERE
        for backend in ALL_BACKENDS
        if backend in BACKENDS or case in OTHER_GENERATIONS[backend]
    ]
    + [(backend, *case) for case in CASES for backend in BACKENDS],
    ids=name,
)
def test_as_good_as_materialising(
    backend: str, dtype: torch.dtype, many: bool, with_bias: bool, options: dict[str, Any]
) -> None:
    require(backend)
    sizes = sizes_for(dtype)
    vocab_size = sizes.many if many else sizes.V
    p = gpu_problem(sizes.shape, D=sizes.D, V=vocab_size, sharpness=2.0, dtype=dtype, ignored=0.1)
    assert sizes.D < int((p.labels >= 0).sum()) < p.labels.numel()
    expected, exact, ordinary = exact_and_ordinary(p, with_bias, **own(options))
    out = linear_task_cross_entropy(*p.tensors, bias=p.bias if with_bias else None, backend=backend, **options)
    for field in ("loss", "task_loss", "lse"):
        # 520 products per logit, summed in float32; losses are sums of a few hundred rows.
        assert error(getattr(out, field), getattr(expected, field)) <= 5e-6, field
    assert out.task_tokens.tolist() == expected.task_tokens.tolist()
    assert out.task_correct.tolist() == expected.task_correct.tolist()
    inputs = [p.hidden, p.weight, *([p.bias] if with_bias else [])]
    assert_gradients(gradients(out.loss, inputs), exact, ordinary, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(FP32, {}), (BF16, {}), (BF16, {"softcap": 5.0, "smoothing": 0.1, "z_loss": 1e-3, "scale": 0.7})],
    ids=name,
)
def test_shards_of_a_vocabulary(backend: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    """Targets elsewhere, statistics of the whole; three tenths of the columns, one, and the others."""
    require(backend)
    sizes = sizes_for(dtype)
    p = gpu_problem(sizes.shape, D=sizes.D, V=sizes.V, sharpness=2.0, dtype=dtype, ignored=0.1)
    rounding = 0.0 if dtype == FP32 else torch.finfo(dtype).eps / 2
    check_shards(
        *(backends.BACKENDS[backend], p, options),
        with_bias=bool(options),
        chunk_size=CHUNK,
        rounding=rounding,
        bounds=(0, 3 * sizes.V // 10, 3 * sizes.V // 10 + 1, sizes.V),
        fp32=1.1e-5,  # as gpu_case.assert_gradients
    )


@pytest.mark.parametrize("backend", ["triton"] if ON_GPU else ["sm_90"])
@pytest.mark.parametrize("supervised", [128 + 100, 256 + 30])
def test_rows_are_stored_held_and_computed_again(
    monkeypatch: pytest.MonkeyPatch, backend: str, supervised: int
) -> None:
    """Of 300 rows 128 wait in dW's memory and 128 in the workspace; the last one is among those, or behind them."""
    require(backend)
    plan_slices, plans = head.plan_slices, []
    monkeypatch.setattr(head, "plan_slices", lambda *args: plans.append(plan_slices(*args)) or plans[-1])
    p = gpu_problem((3, 100), D=112, V=449, sharpness=2.0, dtype=BF16, ignored=0.0)
    p.labels.view(-1)[torch.randperm(300, generator=torch.Generator().manual_seed(0))[supervised:].to(DEVICE)] = -100
    _, exact, ordinary = exact_and_ordinary(p, True)
    out = linear_task_cross_entropy(*p.tensors, bias=p.bias, backend=backend, chunk_size=260)
    assert_gradients(gradients(out.loss, [p.hidden, p.weight, p.bias]), exact, ordinary, BF16)
    assert [(plan.stored_rows, plan.held_rows, len(plan.ranges())) for plan in plans] == [(128, 128, 2)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_frozen_sides(backend: str, frozen: str) -> None:
    """Frozen head: windows of rows with the whole vocabulary. Frozen trunk: dW alone."""
    require(backend)
    p = gpu_problem(SHAPE, D=D, V=V, sharpness=2.0, dtype=torch.bfloat16, ignored=0.1)
    _, exact, ordinary = exact_and_ordinary(p, True)
    getattr(p, frozen).requires_grad_(False)
    out = linear_task_cross_entropy(*p.tensors, bias=p.bias, backend=backend, chunk_size=5 * CHUNK)
    keep = [index for index, side in enumerate(("hidden", "weight", "bias")) if side != frozen]
    inputs = [(p.hidden, p.weight, p.bias)[index] for index in keep]
    actual = gradients(out.loss, inputs)
    assert_gradients(actual, [exact[index] for index in keep], [ordinary[index] for index in keep], torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sizes", [(1, 8, 1), (1, 16, 1003), (130, 7, 17), (300, 63, 129)][: None if ON_GPU else 3], ids=str
)  # M, D, V
@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=name)
def test_extreme_sizes(backend: str, sizes: tuple[int, int, int], options: dict[str, Any]) -> None:
    """One of everything; widths that no 16-byte load, tile or descriptor fits."""
    require(backend)
    M, width, vocab_size = sizes
    p = gpu_problem((M,), D=width, V=vocab_size, K=1, dtype=torch.bfloat16, ignored=0.0)
    p.task_ids.zero_()
    _, exact, ordinary = exact_and_ordinary(p, True)
    out = linear_task_cross_entropy(*p.tensors, bias=p.bias, backend=backend, **options)
    for a, wanted, baseline in zip(gradients(out.loss, [p.hidden, p.weight, p.bias]), exact, ordinary, strict=True):
        # Few numbers: no mean to speak of. One word only: gradients are zero, or a rounding of zero.
        assert (
            error(a, wanted) <= max(2**-7, error(baseline, wanted)) or float((a.double() - wanted).abs().max()) < 1e-6
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"aggregation": "none"}], ids=name)
@pytest.mark.parametrize("size", [0, 5])
def test_nothing_supervised(backend: str, options: dict[str, Any], size: int) -> None:
    require(backend)
    p = gpu_problem((size, 3), D=64, V=300, dtype=torch.bfloat16, ignored=1.1)
    out = linear_task_cross_entropy(*p.tensors, bias=p.bias, backend=backend, **options)
    out.loss.sum().backward()
    assert bool((out.loss == 0).all())
    assert all(bool((leaf.grad == 0).all()) for leaf in (p.hidden, p.weight, p.bias, p.task_weights))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wide", [True, False])
def test_gradient_buffer(backend: str, wide: bool) -> None:
    require(backend)
    dtype = FP32 if wide else torch.bfloat16
    p = gpu_problem(SHAPE, D=D, V=V, sharpness=2.0, dtype=torch.bfloat16, ignored=0.1)
    _, exact, _ = exact_and_ordinary(p, False)
    buffer = torch.randn(V, D, device=DEVICE).mul_(float(exact[1].abs().max())).to(dtype)
    before = buffer.double()
    linear_task_cross_entropy(*p.tensors, grad_weight_out=buffer, chunk_size=CHUNK, backend=backend).loss.backward()
    wanted = before - exact[1]  # upstream_like of a scalar is -1
    # One rounding of the gradient of the logits to 8 bits, and one of the sum.
    allowed = 2**-8 * exact[1].abs().max() + wanted.abs() * (2**-22 if wide else 2**-8)
    assert bool(((buffer.double() - wanted).abs() <= allowed).all())
    assert p.weight.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_max_tokens(backend: str) -> None:
    require(backend)
    p = gpu_problem(SHAPE, D=D, V=V, dtype=torch.bfloat16, ignored=0.8)
    count = int((p.labels >= 0).sum())
    plain = linear_task_cross_entropy(*p.tensors, backend=backend)
    bounded = linear_task_cross_entropy(*p.tensors, max_tokens=count, backend=backend)
    assert error(bounded.loss, plain.loss) <= 1e-6
    (a,), (b,) = gradients(bounded.loss, [p.weight]), gradients(plain.loss, [p.weight])
    assert error(a, b) <= 2**-7
    assert bool(linear_task_cross_entropy(*p.tensors, max_tokens=count - 1, backend=backend).loss.isnan())
    with pytest.raises(ValueError, match="max_tokens must be at least"):
        linear_task_cross_entropy(*p.tensors, max_tokens=count - 1, check=True, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_values_are_nan(backend: str) -> None:
    require(backend)
    for field, value in (("labels", 300), ("labels", -3), ("task_ids", 4), ("task_weights", float("inf"))):
        p = gpu_problem((40,), D=64, V=300, dtype=torch.bfloat16, ignored=0.0)
        getattr(p, field).data[3] = value
        assert bool(linear_task_cross_entropy(*p.tensors, backend=backend).loss.isnan())
        with pytest.raises(ValueError, match=field):
            linear_task_cross_entropy(*p.tensors, backend=backend, check=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_positions_may_hold_anything(backend: str) -> None:
    require(backend)
    p = gpu_problem(SHAPE, D=D, V=V, dtype=torch.bfloat16, ignored=0.5)
    ignored = p.labels == -100
    for options in ({}, {"aggregation": "none"}):
        p.hidden.data[ignored] = 0
        clean = linear_task_cross_entropy(*p.tensors, backend=backend, chunk_size=CHUNK, **options)
        upstream = torch.ones_like(clean.loss)
        wanted = torch.autograd.grad(clean.loss, [p.hidden, p.weight], upstream)
        p.hidden.data[ignored] = float("nan")
        if clean.loss.dim():
            upstream = upstream.masked_fill(ignored, float("nan"))
        out = linear_task_cross_entropy(*p.tensors, backend=backend, chunk_size=CHUNK, **options)
        for a, b in zip(torch.autograd.grad(out.loss, [p.hidden, p.weight], upstream), wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name)
def test_existing_logits(backend: str, dtype: torch.dtype) -> None:
    require(backend)
    p = gpu_problem((3, 41), D=64, V=MANY, sharpness=2.0, dtype=dtype)
    logits = (p.hidden @ p.weight.t()).detach().requires_grad_()
    expected = reference_task_cross_entropy(logits, *p.tensors[2:], aggregation="none", **ALL)
    out = task_cross_entropy(logits, *p.tensors[2:], aggregation="none", backend=backend, **ALL)
    assert error(out.loss, expected.loss) <= 5e-6
    (actual,), (wanted,) = gradients(out.loss, [logits]), gradients(expected.loss, [logits])
    assert error(actual, wanted) <= torch.finfo(dtype).eps / 2 + 5e-6
    inplace = {"aggregation": "none", "backend": backend, "inplace_backward": True}
    (over,) = gradients(task_cross_entropy(logits, *p.tensors[2:], **inplace, **ALL).loss, [logits])
    assert torch.equal(over, actual)
    assert over.data_ptr() == logits.data_ptr()


# --- more than 2^31 elements --------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_of_more_logits_than_int32(backend: str, big_memory: Callable[[float], None]) -> None:
    require(backend)
    big_memory(8)
    M, vocab_size = 70_001, 32_003
    assert M * vocab_size > 2**31
    p = gpu_problem((M,), D=64, V=vocab_size, dtype=BF16, ignored=0.0)
    with torch.no_grad():
        out = linear_task_cross_entropy(*p.tensors, aggregation="none", backend=backend)
        for rows in (slice(0, 50), slice(M - 50, M)):
            part = (p.hidden[rows], p.weight, p.labels[rows], p.task_ids[rows], p.task_weights)
            expected = linear_task_cross_entropy(*part, aggregation="none", backend="reference")
            assert error(out.loss[rows], expected.loss) <= 5e-6


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=name)
def test_gradients_of_more_weights_than_int32(
    backend: str, options: dict[str, Any], big_memory: Callable[[float], None]
) -> None:
    require(backend)
    big_memory(40)
    M, width, vocab_size = 96, 8192, 262_147
    assert width * vocab_size > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(M, width, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = torch.empty(vocab_size, width, device="cuda", dtype=BF16)
    for block in weight.split(8192):
        block.copy_(torch.randn(block.shape, device="cuda", generator=generator) * (2 / width**0.5))
    weight.requires_grad_()
    labels = torch.randint(vocab_size, (M,), device="cuda", generator=generator)
    labels[:2] = torch.tensor([vocab_size - 1, 0])
    tasks, lam = torch.zeros_like(labels), torch.ones(1, device="cuda")
    out = linear_task_cross_entropy(hidden, weight, labels, tasks, lam, backend=backend, chunk_size=8, **options)
    grad_hidden, grad_weight = torch.autograd.grad(out.loss, (hidden, weight))
    wide = hidden.detach().double()
    logits = torch.cat([wide @ block.double().t() for block in weight.detach().split(8192)], 1)
    assert error(out.lse, logits.logsumexp(1)) <= 5e-6
    dlogits = torch.softmax(logits, 1)
    dlogits[torch.arange(M, device="cuda"), labels] -= 1
    dlogits /= M
    for rows in (slice(0, 300), slice(131_000, 131_300), slice(vocab_size - 300, vocab_size)):
        wanted = dlogits[:, rows].t() @ wide
        if float(dlogits[:, rows].min()) < -1e-3:  # a target is among them
            assert error(grad_weight[rows], wanted) <= 2**-7
        # Where there is none, entries are of the size of probabilities: each within the three roundings to 8 bits.
        assert float((grad_weight[rows].double() - wanted).square().mean().sqrt()) <= 2**-7 * float(
            wanted.square().mean().sqrt()
        )
    exact = sum(
        part @ block.double() for part, block in zip(dlogits.split(8192, 1), weight.detach().split(8192), strict=True)
    )
    assert error(grad_hidden, exact) <= 2**-7


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_existing_logits_than_int32(backend: str, big_memory: Callable[[float], None]) -> None:
    require(backend)
    big_memory(16)
    M, vocab_size = 16_385, 131_080
    assert M * vocab_size > 2**31
    logits = torch.empty(M, vocab_size, device="cuda", dtype=BF16).normal_().requires_grad_()
    labels = torch.randint(vocab_size, (M,), device="cuda")
    labels[100 : M - 100] = -100
    tasks, lam = torch.zeros_like(labels), torch.ones(1, device="cuda")
    out = task_cross_entropy(logits, labels, tasks, lam, aggregation="none", backend=backend)
    (actual,) = torch.autograd.grad(out.loss.sum(), logits)
    for rows in (slice(0, 30), slice(M - 30, M)):
        exact = logits[rows].detach().double()
        assert error(out.lse[rows], exact.logsumexp(1)) <= 5e-6
        wanted = torch.softmax(exact, 1)
        wanted[torch.arange(30, device="cuda"), labels[rows]] -= 1
        assert error(actual[rows], wanted) <= 2**-8
    assert bool((actual[5000] == 0).all())
