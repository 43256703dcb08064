"""Edge cases and guarantees: nothing supervised, weight zero, offsets, determinism, upstream gradients."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from loss_problems import FP32, Problem, error, make_problem
from torch.autograd import forward_ad

from cotbal_kernels import linear_task_cross_entropy, task_cross_entropy
from cotbal_kernels.reference import reference_linear_task_cross_entropy, reference_task_cross_entropy

AGGREGATIONS = ["token", "task", "sum", "none"]
FUNCTIONS = ["linear", "linear-rows", "logits"]


def call(function: str, p: Problem, **kwargs):
    """The loss through each of the three ops, and the leaves it should have gradients in."""
    if function == "logits":
        logits = (p.hidden @ p.weight.t()).detach().requires_grad_()
        return task_cross_entropy(logits, *p.tensors[2:], **kwargs), [logits, p.task_weights]
    rows = function == "linear-rows"
    out = linear_task_cross_entropy(*p.tensors, bias=p.bias, differentiable_tasks=rows, **kwargs)
    return out, [p.hidden, p.weight, p.bias, p.task_weights]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5), (0, 5), (2, 0)])
def test_nothing_supervised(function: str, aggregation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Loss 0 attached to the graph and zero gradients, so that no rank falls out of a collective."""
    p = make_problem(shape, ignored=1.1, dtype=dtype)
    out, leaves = call(function, p, aggregation=aggregation)
    assert out.loss.requires_grad
    assert bool((out.loss == 0).all())
    out.loss.sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert bool((leaf.grad == 0).all())
    assert out.task_loss.tolist() == out.task_tokens.tolist() == out.task_correct.tolist() == [0] * 4
    p.task_ids = torch.zeros(shape[0], dtype=torch.int64)
    for backend in ("auto", "reference"):
        of_sequences, _ = call(function, p, aggregation=aggregation, backend=backend)
        assert torch.equal(of_sequences.loss.float(), out.loss)


@pytest.mark.parametrize("aggregation", ["token", "task"])
def test_normalizer_of_zero_is_a_loss_of_zero(aggregation: str) -> None:
    p = make_problem()
    for zero in [torch.zeros(4)] if aggregation == "task" else [torch.tensor(0.0), 0]:
        out = linear_task_cross_entropy(*p.tensors, aggregation=aggregation, normalizer=zero)
        out.loss.backward()
        assert out.loss.item() == 0
        assert all(bool((leaf.grad == 0).all()) for leaf in (p.hidden, p.weight, p.task_weights))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_absent_task(function: str, aggregation: str) -> None:
    p = make_problem(ignored=0.1)
    p.task_ids[p.task_ids == 2] = 1
    out, leaves = call(function, p, aggregation=aggregation)
    bias = None if function == "logits" else p.bias
    expected = reference_linear_task_cross_entropy(*p.tensors, bias=bias, aggregation=aggregation)
    assert error(out.loss, expected.loss) <= FP32
    assert out.task_loss[2] == out.task_tokens[2] == out.task_correct[2] == 0
    out.loss.sum().backward()
    assert all(bool(torch.isfinite(leaf.grad).all()) for leaf in leaves)


def test_unsupervised_positions_may_hold_anything() -> None:
    """NaN in hidden states, task ids out of range: never looked at where the label is ignored."""
    p = make_problem()
    wanted = linear_task_cross_entropy(*p.tensors).loss
    ignored = p.labels == -100
    p.hidden.data[ignored] = float("nan")
    p.task_ids[ignored] = -7
    out = linear_task_cross_entropy(*p.tensors)
    assert torch.equal(out.loss, wanted)
    out.loss.backward()
    assert bool(torch.isfinite(p.hidden.grad).all())
    assert bool(torch.isfinite(p.weight.grad).all())


def test_task_of_weight_zero_is_skipped_unless_wanted() -> None:
    p = make_problem(ignored=0.1)
    p.task_weights.data[1] = 0
    wanted = reference_linear_task_cross_entropy(*p.tensors)
    frozen = dataclasses.replace(p, task_weights=p.task_weights.detach())
    skipped = linear_task_cross_entropy(*frozen.tensors)
    assert error(skipped.loss, wanted.loss) <= FP32
    assert skipped.task_loss[1] == skipped.task_correct[1] == 0
    assert skipped.task_tokens.tolist() == wanted.task_tokens.tolist()
    assert wanted.task_tokens[1] > 0
    for computed in (
        linear_task_cross_entropy(*p.tensors),  # lambda has a gradient there
        linear_task_cross_entropy(*frozen.tensors, differentiable_tasks=True),
    ):
        assert error(computed.task_loss, wanted.task_loss) <= FP32
    (actual,) = torch.autograd.grad(linear_task_cross_entropy(*p.tensors).loss, p.task_weights)
    assert error(actual, torch.autograd.grad(wanted.loss, p.task_weights)[0]) <= 10 * FP32
    assert abs(float(actual[1])) > 0.01


def test_confident_tokens_count() -> None:
    """A token of loss exactly 0 in float32 is still supervised: it stays in the denominator."""
    logits = torch.zeros(2, 5)
    logits[0, 3] = 200.0
    labels, ids, lam = torch.tensor([3, 1]), torch.tensor([0, 0]), torch.ones(1)
    out = task_cross_entropy(logits, labels, ids, lam)
    assert out.task_tokens.tolist() == [2]
    assert float(out.loss) == pytest.approx(float(torch.tensor(5.0).log()) / 2, rel=1e-6)


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_large_offsets_lose_nothing(offset: float) -> None:
    """Loss as log l - (z - m): an offset common to all logits changes nothing. (m + log l) - z is off by 1e-3."""
    generator = torch.Generator().manual_seed(0)
    # Multiples of 2^-9: adding 1e4 to them is exact in float32.
    plain = (torch.randn(50, 70, generator=generator) * 512).round() / 512
    labels, ids = torch.randint(70, (50,), generator=generator), torch.zeros(50, dtype=torch.int64)
    logits = (plain + offset).requires_grad_()
    assert torch.equal(logits.detach() - offset, plain)
    out = task_cross_entropy(logits, labels, ids, torch.ones(1))
    expected = reference_task_cross_entropy(logits, labels, ids, torch.ones(1))
    assert error(out.loss, expected.loss) <= FP32
    actual, wanted = (torch.autograd.grad(o.loss, logits)[0] for o in (out, expected))
    assert error(actual, wanted) <= FP32
    # Through the linear op: the offset is a bias, the products are small.
    hidden, weight = plain[:, :8].clone().requires_grad_(), torch.eye(70, 8)
    bias = torch.full((70,), offset)
    args = (hidden, weight, labels, ids, torch.ones(1))
    for rows in (False, True):
        linear = linear_task_cross_entropy(*args, bias=bias, differentiable_tasks=rows)
        reference = reference_linear_task_cross_entropy(*args, bias=bias)
        assert error(linear.loss, reference.loss) <= FP32
        actual, wanted = (torch.autograd.grad(o.loss, hidden)[0] for o in (linear, reference))
        assert error(actual, wanted) <= FP32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p_target", [0.9, 0.99, 0.999])
def test_target_minus_one_is_formed_before_rounding(dtype: torch.dtype, p_target: float) -> None:
    """p rounded to bf16 before p - 1 gives a gradient off by 20 % at p = .99 and by 100 % at .999."""
    V = 33
    gap = float(torch.tensor(p_target * (V - 1) / (1 - p_target)).log())
    logits = torch.zeros(1, V, dtype=dtype)
    logits[0, 4] = gap
    logits.requires_grad_()
    labels, ids, lam = torch.tensor([4]), torch.tensor([0]), torch.ones(1)
    out = task_cross_entropy(logits, labels, ids, lam)
    (actual,) = torch.autograd.grad(out.loss, logits)
    exact = logits.detach().double().softmax(1)
    exact[0, 4] -= 1
    # The result's own rounding, and four float32 roundings (exp, sum, quotient, product) relative to 1 - p.
    tolerance = torch.finfo(dtype).eps / 2 + 4 * 6e-8 / (1 - p_target)
    assert error(actual[:, 4], exact[:, 4]) <= tolerance


@pytest.mark.parametrize("differentiable", [False, True])
def test_upstream_gradients_other_than_one(differentiable: bool) -> None:
    """Regressions: grad_output[0] applied to every row; an upstream rounded before use."""
    p = make_problem()
    upstream = torch.linspace(-3, 3, p.labels.numel()).reshape(p.labels.shape)
    out = linear_task_cross_entropy(*p.tensors, aggregation="none", differentiable_tasks=differentiable)
    expected = reference_linear_task_cross_entropy(*p.tensors, aggregation="none")
    for a, b in zip(
        torch.autograd.grad((out.loss * upstream).sum(), (p.hidden, p.weight)),
        torch.autograd.grad((expected.loss * upstream).sum(), (p.hidden, p.weight)),
        strict=True,
    ):
        assert error(a, b) <= FP32
    out = linear_task_cross_entropy(*p.tensors)
    (a,) = torch.autograd.grad(out.loss * (1 / 3), p.hidden)
    (b,) = torch.autograd.grad(reference_linear_task_cross_entropy(*p.tensors).loss / 3, p.hidden)
    assert error(a, b) <= FP32
    half = make_problem(dtype=torch.bfloat16)
    (one,) = torch.autograd.grad(linear_task_cross_entropy(*half.tensors).loss, half.weight)
    (scaled,) = torch.autograd.grad(linear_task_cross_entropy(*half.tensors).loss * 1.003, half.weight)
    assert torch.equal(scaled, (one.float() * 1.003).bfloat16())  # 1.003 in bf16 would be 1
    assert not torch.equal(scaled, one)


def test_fp16_gradients_survive_a_late_loss_scale() -> None:
    """Gradients wait in float32: divided by 1e6 tokens they underflow in fp16 before the loss scale arrives."""
    p = make_problem(dtype=torch.float16)
    args = {"normalizer": 1e6}
    expected = reference_linear_task_cross_entropy(*p.tensors, **args)
    wanted = torch.autograd.grad(expected.loss * 65536, (p.hidden, p.weight))
    out = linear_task_cross_entropy(*p.tensors, **args)
    for actual, b in zip(torch.autograd.grad(out.loss * 65536, (p.hidden, p.weight)), wanted, strict=True):
        assert error(actual, b) <= torch.finfo(torch.float16).eps


@pytest.mark.parametrize("function", FUNCTIONS)
def test_graph_used_twice(function: str) -> None:
    """A second backward, and one loss used twice, see the gradients unchanged; the last may scale them in place."""
    p = make_problem()
    out, leaves = call(function, p)
    first = torch.autograd.grad(out.loss * 3, leaves, retain_graph=True)
    second = torch.autograd.grad(out.loss * 3, leaves, retain_graph=True)
    once = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(out.loss + 2 * out.loss, leaves)
    again, leaves = call(function, p)
    for a, b, c, d, e in zip(first, second, twice, once, torch.autograd.grad(again.loss, leaves), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert torch.equal(d, e)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_statistics_summed_over_ranks_before_the_backward_pass(function: str, aggregation: str) -> None:
    """A collective writes into them without a word to autograd; ``.data`` does the same."""
    wanted, leaves = call(function, make_problem(), aggregation=aggregation)
    expected = torch.autograd.grad(wanted.loss.sum(), leaves)
    out, leaves = call(function, make_problem(), aggregation=aggregation)
    for statistic in (out.task_loss, out.task_tokens, out.task_correct, out.lse):
        statistic.data.mul_(3)
        statistic.detach().add_(1)
    for a, b in zip(torch.autograd.grad(out.loss.sum(), leaves), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_derivative_is_refused(function: str) -> None:
    out, leaves = call(function, make_problem())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.loss, leaves, create_graph=True)


@pytest.mark.parametrize("function", ["linear", "linear-rows"])
def test_many_upstream_gradients_at_once_are_refused(function: str) -> None:
    out, leaves = call(function, make_problem())
    with pytest.raises(RuntimeError, match=r"is_grads_batched=True .* not supported; call torch\.autograd\.grad"):
        torch.autograd.grad(out.loss, leaves, torch.ones(2), is_grads_batched=True, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"torch\.vmap are not supported"):
        torch.vmap(lambda one: torch.autograd.grad(out.loss, leaves, one))(torch.ones(2))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ["scores", "task_weights", "normalizer"])
def test_transforms_are_refused_by_name(function: str, name: str) -> None:
    """Tangents and gradients were missing without a word; ``backend="reference"``, the advice, has the right ones."""
    p = make_problem()
    logits = (p.hidden @ p.weight.t()).detach()
    scores = logits if function == "logits" else p.hidden.detach()
    given = {"scores": scores, "task_weights": p.task_weights.detach(), "normalizer": torch.tensor(7.0)}
    point, weight = given[name], p.weight.detach()
    tangent = torch.linspace(-1, 1, point.numel()).reshape(point.shape)

    def loss(value: torch.Tensor, backend: str = "portable") -> torch.Tensor:
        scores, task_weights, normalizer = {**given, name: value}.values()
        rest = (p.labels, p.task_ids, task_weights)
        if function == "logits":
            return task_cross_entropy(scores, *rest, normalizer=normalizer, backend=backend).loss
        rows = function == "linear-rows"
        return linear_task_cross_entropy(
            scores, weight, *rest, normalizer=normalizer, backend=backend, differentiable_tasks=rows
        ).loss

    shown = {"scores": "logits" if function == "logits" else "hidden"}.get(name, name)
    with pytest.raises(ValueError, match=f"{shown} must be .* torch.func transform .* torch.autograd.grad"):
        torch.func.jvp(loss, (point,), (tangent,))
    with pytest.raises(ValueError, match=f"{shown} must be .* torch.func transform .* torch.autograd.grad"):
        torch.func.grad(loss)(point)
    with pytest.raises(ValueError, match=f"{shown} must be .* inside torch.vmap; .* pass it whole"):
        torch.vmap(loss)(point.expand(2, *point.shape))
    with forward_ad.dual_level(), pytest.raises(ValueError, match=f"{shown} must carry no tangent"):
        loss(forward_ad.make_dual(point, tangent))

    def by_reference(value: torch.Tensor) -> torch.Tensor:
        return loss(value, "reference")

    gradient = torch.autograd.grad(loss(point.requires_grad_()), point)[0]
    point = point.detach()
    assert error(torch.func.grad(by_reference)(point), gradient) <= 10 * FP32
    _, directional = torch.func.jvp(by_reference, (point,), (tangent,))
    assert error(directional, (gradient * tangent).sum()) <= 100 * FP32  # terms of both signs cancel


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("only", ["hidden", "weight", "bias", "task_weights"])
def test_one_input_requires_grad(rows: bool, only: str) -> None:
    p = make_problem()
    wanted = torch.autograd.grad(reference_linear_task_cross_entropy(*p.tensors, bias=p.bias).loss, getattr(p, only))[0]
    q = Problem(**{f.name: getattr(p, f.name).detach() for f in dataclasses.fields(p)})
    getattr(q, only).requires_grad_()
    linear_task_cross_entropy(*q.tensors, bias=q.bias, differentiable_tasks=rows).loss.backward()
    assert error(getattr(q, only).grad, wanted) <= 10 * FP32
    assert all(getattr(q, f.name).grad is None for f in dataclasses.fields(q) if f.name != only)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_bitwise_reproducible(function: str, dtype: torch.dtype) -> None:
    """Large enough for two threads: the second run gives the same bits."""
    results = []
    for _ in range(3):
        p = make_problem((4, 300), D=32, V=150, K=7, dtype=dtype)
        out, leaves = call(function, p, chunk_size=300)
        results.append([*(t.detach() for t in out), *torch.autograd.grad(out.loss, leaves)])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_micro_batches_add_up_to_one_batch() -> None:
    """k micro-batches with the global normalizer give the gradient of one batch (fp32, 1e-6)."""
    p = make_problem((6, 20), K=3)
    p.task_ids[:2] = 0  # unevenly spread: the first micro-batch holds one task only
    p.labels[2:3] = -100
    whole = linear_task_cross_entropy(*p.tensors, shift=True)
    normalizer = (p.task_weights.detach() * whole.task_tokens).sum()
    parts = [
        linear_task_cross_entropy(
            p.hidden[i], p.weight, p.labels[i], p.task_ids[i], p.task_weights, shift=True, normalizer=normalizer
        ).loss
        for i in (slice(0, 2), slice(2, 3), slice(3, 6))
    ]
    inputs = (p.hidden, p.weight)
    for a, b in zip(torch.autograd.grad(sum(parts), inputs), torch.autograd.grad(whole.loss, inputs), strict=True):
        assert error(a, b) <= 1e-6


def test_bf16_weight_gradient_does_not_drift_over_chunks() -> None:
    """dW is accumulated in float32 over 400 chunks and rounded once; bf16 accumulation is off by percents."""
    p = make_problem((1, 400), D=16, V=20, dtype=torch.bfloat16, ignored=0.0)
    wide = p.weight.detach().double().requires_grad_()
    expected = reference_linear_task_cross_entropy(p.hidden.detach(), wide, *p.tensors[2:])
    (wanted,) = torch.autograd.grad(expected.loss, wide)
    for rows in (False, True):
        out = linear_task_cross_entropy(*p.tensors, chunk_size=1, differentiable_tasks=rows)
        (actual,) = torch.autograd.grad(out.loss, p.weight)
        assert error(actual, wanted) <= torch.finfo(torch.bfloat16).eps / 2 + FP32


def test_single_task_is_plain_cross_entropy(problem: Problem) -> None:
    p = problem
    out = linear_task_cross_entropy(
        p.hidden, p.weight, p.labels, torch.zeros(3, dtype=torch.int64), torch.ones(1), bias=p.bias
    )
    logits = F.linear(p.hidden, p.weight, p.bias)
    assert error(out.loss, F.cross_entropy(logits.flatten(0, 1), p.labels.flatten())) <= FP32


def test_the_first_of_equal_logits_is_the_argmax() -> None:
    """Logits of few distinct values: most rows have several largest, before and behind the target."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (400, 11), generator=generator).float()
    logits[::5] = 1.0  # all equal
    labels = torch.randint(0, 11, (400,), generator=generator)
    task_ids = torch.arange(400) % 2
    first = torch.tensor([row.index(max(row)) for row in logits.tolist()])
    expected = [int(((first == labels) & (task_ids == task)).sum()) for task in (0, 1)]
    last = torch.tensor([10 - row[::-1].index(max(row)) for row in logits.tolist()])
    assert min(expected) > 0
    assert ((last == labels) & (last != first)).any(), "the last of the largest would pass too"
    for weights in (torch.ones(2), torch.tensor([0.5, 2.0], requires_grad=True)):
        out = task_cross_entropy(logits, labels, task_ids, weights)
        assert out.task_correct.tolist() == expected
        hidden, weight = logits, torch.eye(11)  # the same logits from a head
        assert linear_task_cross_entropy(hidden, weight, labels, task_ids, weights).task_correct.tolist() == expected
