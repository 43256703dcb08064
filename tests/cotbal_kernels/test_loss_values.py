"""Loss and every gradient against the float64 reference: all aggregations, options, dtypes and shapes."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loss_problems import FP32, Problem, error, make_problem

from cotbal_kernels import TaskLoss, linear_task_cross_entropy, portable, portable_softmax, task_cross_entropy
from cotbal_kernels.reference import reference_linear_task_cross_entropy, reference_task_cross_entropy

AGGREGATIONS = ["token", "task", "sum", "none"]
OPTIONS = [
    {},
    {"logit_softcap": 1.5},
    {"label_smoothing": 0.2},
    {"z_loss": 0.05},
    {"logit_scale": 0.3},
    {"logit_softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 1.7},
]


def upstream_like(loss: torch.Tensor) -> torch.Tensor:
    """A gradient that is not all ones: for "none" it differs from row to row."""
    return torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)


def gradients(out: TaskLoss, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(out.loss, inputs, upstream_like(out.loss), retain_graph=True)


def assert_same(out: TaskLoss, expected: TaskLoss, tolerance: float) -> None:
    assert out.loss.dtype == out.task_loss.dtype == out.lse.dtype == torch.float32
    assert error(out.loss, expected.loss) <= tolerance
    assert error(out.task_loss, expected.task_loss) <= tolerance
    # A maximum plus a logarithm, which may cancel: four roundings of terms of order one.
    absolute = float((out.lse.double() - expected.lse).abs().max()) if out.lse.numel() else 0.0
    assert error(out.lse, expected.lse) <= tolerance or absolute <= 4 * 2**-24
    assert out.task_tokens.tolist() == expected.task_tokens.tolist()
    assert out.task_correct.tolist() == expected.task_correct.tolist()


def assert_same_gradients(
    out: TaskLoss, expected: TaskLoss, inputs: Sequence[torch.Tensor], weights: torch.Tensor
) -> None:
    # Gradients of lambda [K] are differences of S_k and loss * T_k over the normalizer, and may cancel to
    # nothing, as any gradient does with one word in the vocabulary: bound the error there by four roundings of
    # the terms. Those of the other gradients are of order one.
    normalizer = float((weights.detach() * expected.task_tokens).sum()) or 1.0
    terms = max(1.0, float(expected.task_loss.detach().max()) / normalizer)
    for actual, wanted in zip(gradients(out, *inputs), gradients(expected, *inputs), strict=True):
        absolute = float((actual.double() - wanted.double()).abs().max()) if actual.numel() else 0.0
        assert error(actual, wanted) <= FP32 or absolute <= 4 * 2**-24 * terms


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_matches_reference(aggregation: str, options: dict, with_bias: bool) -> None:
    p = make_problem(sharpness=2.0)
    kwargs = {"aggregation": aggregation, "bias": p.bias if with_bias else None, **options}
    inputs = [p.hidden, p.weight, p.task_weights, *([p.bias] if with_bias else [])]
    expected = reference_linear_task_cross_entropy(*p.tensors, **kwargs)
    for chunk_size in (None, 7):  # one chunk of some 30 supervised rows; five with a ragged last one
        out = linear_task_cross_entropy(*p.tensors, chunk_size=chunk_size, **kwargs)
        assert_same(out, expected, FP32)
        assert_same_gradients(out, expected, inputs, p.task_weights)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_logits_match_reference(aggregation: str, options: dict) -> None:
    p = make_problem(sharpness=2.0)
    logits = (p.hidden @ p.weight.t()).detach().requires_grad_()
    args = (logits, p.labels, p.task_ids, p.task_weights)
    expected = reference_task_cross_entropy(*args, aggregation=aggregation, **options)
    for chunk_size in (None, 7):
        out = task_cross_entropy(*args, aggregation=aggregation, chunk_size=chunk_size, **options)
        assert_same(out, expected, FP32)
        inputs = (logits, p.task_weights)
        assert_same_gradients(out, expected, inputs, p.task_weights)


@pytest.mark.parametrize("aggregation", ["token", "none"])
@pytest.mark.parametrize(("options", "largest_bias"), [({}, None), ({}, 100.0), (OPTIONS[-1], 100.0)])
def test_portable_where_the_host_does_not_know_the_number_of_rows(
    monkeypatch: pytest.MonkeyPatch, aggregation: str, options: dict, largest_bias: float | None
) -> None:
    """What a GPU does, shown on the CPU: rows up to the capacity, of which those behind the last count for nothing."""
    for module in (portable, portable_softmax):
        monkeypatch.setattr(module, "on_cpu", lambda _: False)
    p = make_problem(sharpness=2.0)
    p.labels[-1, -1] = 5 if largest_bias is None else -100
    if largest_bias is not None:  # the logit of a row without hidden states: beyond 88 its exponential is infinite
        p.bias.data[3] = largest_bias
    supervised = p.labels >= 0
    p.labels[0, :4], supervised[0, :4] = torch.tensor([3, 3, 8, -100]), torch.tensor([True, True, True, False])
    kwargs = {"aggregation": aggregation, "bias": p.bias, **options}
    inputs = [p.hidden, p.weight, p.task_weights, p.bias]
    expected = reference_linear_task_cross_entropy(*p.tensors, **kwargs)
    wanted = gradients(expected, *inputs)
    p.hidden.data[~supervised] = torch.nan
    count = int(supervised.sum())
    for max_tokens, chunk_size in ((None, None), (count, 7), (count + 3, 7)):
        out = linear_task_cross_entropy(*p.tensors, max_tokens=max_tokens, chunk_size=chunk_size, **kwargs)
        assert_same(out, expected, FP32)
        for actual, exact in zip(gradients(out, *inputs), wanted, strict=True):
            assert error(actual, exact) <= 2 * FP32
    for too_few in (count - 1, count // 2):
        assert bool(linear_task_cross_entropy(*p.tensors, max_tokens=too_few, **kwargs).loss.isnan().any())
    logits = (p.hidden @ p.weight.t() + p.bias).detach().requires_grad_()
    out = task_cross_entropy(logits, *p.tensors[2:], aggregation=aggregation, chunk_size=7, **options)
    assert_same(out, expected, FP32)
    wide = logits.detach().double().masked_fill(logits.isnan(), 0).requires_grad_()
    again = reference_task_cross_entropy(wide, *p.tensors[2:], aggregation=aggregation, **options)
    assert error(*gradients(out, logits), *gradients(again, wide)) <= 2 * FP32


def test_reference_is_pytorch_cross_entropy() -> None:
    """The oracle itself, against torch's own cross-entropy weighted token by token."""
    p = make_problem()
    logits = (p.hidden @ p.weight.t()).double()
    rows = F.cross_entropy(logits.flatten(0, 1), p.labels.flatten(), reduction="none", label_smoothing=0.1)
    lam = p.task_weights.double()[p.task_ids.flatten()] * (p.labels.flatten() != -100)
    out = reference_task_cross_entropy(
        logits, p.labels, p.task_ids, p.task_weights, label_smoothing=0.1, aggregation="token"
    )
    assert error(out.loss, (lam * rows).sum() / lam.sum()) <= 1e-14
    hot = reference_task_cross_entropy(*(logits / 0.7, *p.tensors[2:]), logit_softcap=2.0)  # before the soft cap
    scaled = reference_task_cross_entropy(*(logits, *p.tensors[2:]), logit_scale=1 / 0.7, logit_softcap=2.0)
    assert error(scaled.loss, hot.loss) <= 1e-14
    means = [rows[(lam > 0) & (p.task_ids.flatten() == k)].mean() for k in range(4)]
    weights = p.task_weights.double()
    by_task = sum(weights[k] * means[k] for k in range(4)) / weights.sum()
    out = reference_task_cross_entropy(
        logits, p.labels, p.task_ids, p.task_weights, label_smoothing=0.1, aggregation="task"
    )
    assert error(out.loss, by_task) <= 1e-14


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_words_forbidden_by_a_bias_of_minus_infinity(backend: str, aggregation: str) -> None:
    """As if the other words were all; without a supervised position the loss is 0."""
    p = make_problem((3, 9), V=20)
    p.bias.data[17:] = float("-inf")
    p.labels[p.labels >= 0] %= 17
    for labels in (p.labels, torch.full_like(p.labels, -100)):
        where = (labels, p.task_ids, p.task_weights)
        options = {"aggregation": aggregation}
        out = linear_task_cross_entropy(p.hidden, p.weight, *where, bias=p.bias, backend=backend, **options)
        shown = (p.hidden, p.weight[:17], *where)
        expected = reference_linear_task_cross_entropy(*shown, bias=p.bias[:17], **options)
        assert error(out.loss, expected.loss) <= FP32
        inputs = (p.hidden, p.weight, p.bias, p.task_weights)
        for a, b in zip(gradients(out, *inputs), gradients(expected, *inputs), strict=True):
            assert error(a, b) <= FP32


def test_backend_reference_is_the_oracle(problem: Problem) -> None:
    p = problem
    options = {
        "bias": p.bias,
        "shift": True,
        "ignore_index": 7,
        "aggregation": "none",
        "normalizer": 3.0,
        **OPTIONS[-1],
    }
    p.labels[p.labels == -100] = 7
    expected = reference_linear_task_cross_entropy(*p.tensors, **options)
    out = linear_task_cross_entropy(*p.tensors, **options, backend="reference")
    assert out.loss.dtype == torch.float64
    assert torch.equal(out.loss, expected.loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_normalizers_of_other_dtypes(problem: Problem, dtype: torch.dtype) -> None:
    for options in ({}, {"differentiable_tasks": True}, {"aggregation": "none"}):
        out = linear_task_cross_entropy(*problem.tensors, normalizer=torch.tensor(7, dtype=dtype), **options)
        assert out.loss.dtype == torch.float32
        assert torch.equal(out.loss, linear_task_cross_entropy(*problem.tensors, normalizer=7.0, **options).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharpness", [0.5, 4.0, 16.0])  # from nearly uniform to nearly certain
@pytest.mark.parametrize("logit_scale", [1.0, 0.125, 1.7])
@pytest.mark.parametrize("aggregation", ["token", "none"])
def test_16_bit_is_no_worse_than_materialising(
    dtype: torch.dtype, sharpness: float, aggregation: str, logit_scale: float
) -> None:
    """The bound of the design: error at most that of logits in this dtype + fp32 softmax, on the same inputs."""
    p = make_problem((2, 40), D=64, V=300, dtype=dtype, sharpness=sharpness)
    inputs, options = (p.hidden, p.weight), {"aggregation": aggregation, "logit_scale": logit_scale}
    expected = reference_linear_task_cross_entropy(*p.tensors, **options)
    materialised = reference_task_cross_entropy(
        p.hidden @ p.weight.t(), *p.tensors[2:], **options
    )  # even with a float64 softmax behind it
    ordinary = gradients(materialised, *inputs)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = gradients(reference_linear_task_cross_entropy(*wide, *p.tensors[2:], **options), *wide)
    out = linear_task_cross_entropy(*p.tensors, chunk_size=9, **options)
    assert error(out.loss, expected.loss) <= max(FP32, error(materialised.loss, expected.loss))
    for actual, baseline, wanted in zip(gradients(out, *inputs), ordinary, exact, strict=True):
        assert actual.dtype == dtype
        assert error(actual, wanted) <= error(baseline, wanted)
        # One rounding: half a unit in the last place of the largest entry, 2^-9 in bf16 and 2^-12 in fp16.
        assert error(actual, wanted) <= torch.finfo(dtype).eps / 2 + FP32


def test_float64_is_exact_to_gradcheck() -> None:
    p = make_problem((2, 4), D=3, V=5, dtype=torch.float64)
    weights = p.task_weights.detach()
    for aggregation in ("token", "none"):

        def loss(hidden, weight, bias, aggregation=aggregation):
            return linear_task_cross_entropy(
                hidden,
                weight,
                p.labels,
                p.task_ids,
                weights,
                bias=bias,
                aggregation=aggregation,
                logit_softcap=2.0,
                label_smoothing=0.1,
                z_loss=0.1,
                logit_scale=1.3,
                chunk_size=3,
            ).loss

        assert torch.autograd.gradcheck(loss, (p.hidden, p.weight, p.bias))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 9),
    D=st.integers(1, 9),
    V=st.integers(1, 40),
    K=st.integers(1, 6),
    ignored=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    aggregation=st.sampled_from(AGGREGATIONS),
    shift=st.booleans(),
    per_sequence=st.booleans(),
    differentiable=st.booleans(),
    zero_first=st.booleans(),
    chunk_size=st.sampled_from([None, 1, 2, 5]),
    seed=st.integers(0, 1000),
)
@example(1, 2, 6, 35, 2, 0.0, "token", False, False, False, False, None, 140)  # d lambda cancels to zero
@example(1, 2, 2, 2, 1, 0.3, "token", False, False, False, False, None, 116)  # lse does, nearly
def test_any_shape(
    batch, length, D, V, K, ignored, aggregation, shift, per_sequence, differentiable, zero_first, chunk_size, seed
) -> None:
    p = make_problem((batch, length), D=D, V=V, K=K, ignored=ignored, seed=seed)
    if zero_first:
        p.task_weights.data[0] = 0
    ids = p.task_ids[:, 0] if per_sequence else p.task_ids
    args = (p.hidden, p.weight, p.labels, ids, p.task_weights)
    kwargs = {"aggregation": aggregation, "shift": shift}
    expected = reference_linear_task_cross_entropy(*args, **kwargs)
    out = linear_task_cross_entropy(*args, chunk_size=chunk_size, differentiable_tasks=differentiable, **kwargs)
    assert_same(out, expected, FP32)
    inputs = (p.hidden, p.weight, p.task_weights)
    assert_same_gradients(out, expected, inputs, p.task_weights)


def test_differentiable_tasks(problem: Problem) -> None:
    p = problem
    mix = torch.tensor([0.3, -1.0, 2.0, 0.7])
    out = linear_task_cross_entropy(*p.tensors, differentiable_tasks=True, chunk_size=5)
    expected = reference_linear_task_cross_entropy(*p.tensors)
    total, wanted = (o.loss + (mix * o.task_loss).sum() for o in (out, expected))
    for a, b in zip(
        torch.autograd.grad(total, (p.hidden, p.weight)),
        torch.autograd.grad(wanted, (p.hidden, p.weight)),
        strict=True,
    ):
        assert error(a, b) <= FP32
    for options in ({}, {"recompute": True}, {"aggregation": "none"}):
        assert not linear_task_cross_entropy(*p.tensors, **options).task_loss.requires_grad
    logits = (p.hidden @ p.weight.t()).detach().requires_grad_()
    out = task_cross_entropy(logits, *p.tensors[2:], differentiable_tasks=True)
    expected = reference_task_cross_entropy(logits, *p.tensors[2:])
    a, b = (torch.autograd.grad((mix * o.task_loss).sum(), logits)[0] for o in (out, expected))
    assert error(a, b) <= FP32


def test_gradient_of_task_weights_is_the_formula(problem: Problem) -> None:
    """d loss / d lambda_k = (S_k - loss T_k) / normalizer."""
    p = problem
    out = linear_task_cross_entropy(*p.tensors)
    (actual,) = torch.autograd.grad(out.loss, p.task_weights)
    normalizer = (p.task_weights * out.task_tokens).sum()
    wanted = (out.task_loss - out.loss * out.task_tokens) / normalizer
    # The two terms nearly cancel: the rounding is that of the terms, not of their difference.
    assert float((actual - wanted).detach().abs().max()) <= FP32 * float((out.task_loss / normalizer).max().detach())


def test_shift_is_the_next_label_and_its_task() -> None:
    p = make_problem((3, 9))
    out = linear_task_cross_entropy(*p.tensors, shift=True, aggregation="none")
    explicit = linear_task_cross_entropy(
        p.hidden[:, :-1], p.weight, p.labels[:, 1:], p.task_ids[:, 1:], p.task_weights, aggregation="none"
    )
    assert torch.equal(out.loss[:, :-1], explicit.loss)
    assert bool((out.loss[:, -1] == 0).all())
    assert out.task_tokens.tolist() == explicit.task_tokens.tolist()
    flat = linear_task_cross_entropy(
        p.hidden[0], p.weight, p.labels[0], p.task_ids[0], p.task_weights, shift=True, aggregation="none"
    )  # one dimension: the whole tensor is one sequence
    assert error(flat.loss, out.loss[0]) <= FP32


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integer_dtypes_of_task_ids(problem: Problem, dtype: torch.dtype) -> None:
    p = problem
    out = linear_task_cross_entropy(p.hidden, p.weight, p.labels, p.task_ids.to(dtype), p.task_weights)
    assert torch.equal(out.loss, linear_task_cross_entropy(*p.tensors).loss)


def test_explicit_normalizer(problem: Problem) -> None:
    p = problem
    own = (p.task_weights.detach() * linear_task_cross_entropy(*p.tensors).task_tokens).sum()
    plain = linear_task_cross_entropy(*p.tensors).loss
    assert error(linear_task_cross_entropy(*p.tensors, normalizer=2 * own).loss, plain / 2) <= FP32
    assert error(linear_task_cross_entropy(*p.tensors, normalizer=float(own)).loss, plain) <= FP32
    whole = torch.tensor(64)  # an integer, as num_items_in_batch
    assert error(linear_task_cross_entropy(*p.tensors, normalizer=whole).loss, plain * own / 64) <= FP32
    rows = linear_task_cross_entropy(*p.tensors, normalizer=own, aggregation="none").loss
    assert error(rows.sum(), plain) <= FP32
    # An explicit normalizer does not depend on lambda: d loss / d lambda_k is S_k / normalizer.
    out = linear_task_cross_entropy(*p.tensors, normalizer=64.0)
    assert error(torch.autograd.grad(out.loss, p.task_weights)[0], out.task_loss / 64) <= FP32


def test_non_contiguous_inputs() -> None:
    p = make_problem((4, 6))
    hidden = p.hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    weight = p.weight.detach().t().contiguous().t().requires_grad_()
    assert not hidden.is_contiguous()
    out = linear_task_cross_entropy(hidden, weight, p.labels, p.task_ids, p.task_weights)
    expected = reference_linear_task_cross_entropy(*p.tensors)
    assert_same(out, expected, FP32)
    wanted = gradients(expected, p.hidden, p.weight)
    for a, b in zip(gradients(out, hidden, weight), wanted, strict=True):
        assert error(a, b) <= FP32
