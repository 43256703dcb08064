"""Loss and every gradient of the Triton backend, in the interpreter, against the float64 reference."""

import pytest
import torch
import vocabulary_shards

pytest.importorskip("triton")

from loss_problems import FP32, error, make_problem
from triton_on_cpu import INTERPRETED as BACKEND
from triton_on_cpu import compare, gradients, on_cpu, plans  # noqa: F401

from cotbal_kernels import linear_task_cross_entropy, task_cross_entropy
from cotbal_kernels.reference import reference_linear_task_cross_entropy, reference_task_cross_entropy
from cotbal_kernels.triton_kernels import head
from cotbal_kernels.triton_kernels.configs import INTERPRETED

pytestmark = [pytest.mark.usefixtures("on_cpu"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy's

ALL = {"logit_softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.01}
# Positions, D, V: three tiles or more of 16 rows, of 64 vocabulary rows (32 with statistics of their own) and, in D,
# two of 64 (three steps of 32); ragged everywhere.
SHAPE, D, V = (2, 25), 72, 150
WHOLE, SLICED = None, 8  # chunk_size: the whole vocabulary fits the workspace; slices of 22, 64 and 64
# In 16 bits half a unit in the last place, twice: the gradient of the logits is rounded, and so is the result.
TOLERANCE = {torch.float32: FP32, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
NARROW = [torch.float16, torch.bfloat16]


def test_tiles_are_smaller_than_the_problem() -> None:
    rows = int(0.6 * 50)
    assert INTERPRETED.project.rows < rows / 1.5
    assert INTERPRETED.project.cols * 2 < V
    assert INTERPRETED.grad_hidden.cols < D
    assert INTERPRETED.grad_weight.depth < rows / 1.5


@pytest.mark.parametrize(
    ("chunk_size", "with_bias", "options"),
    [
        (WHOLE, False, {}),
        (SLICED, True, {}),
        (SLICED, False, {"logit_scale": 41.0}),
        (SLICED, True, {"logit_softcap": 1.5, "logit_scale": 2.6}),
        (SLICED, False, {"label_smoothing": 0.2}),
        (WHOLE, True, {"label_smoothing": 0.2, "logit_scale": 0.7}),
        (SLICED, False, {"z_loss": 0.05, "aggregation": "task"}),
        (SLICED, True, {"aggregation": "sum", **ALL}),
        (SLICED, True, {"aggregation": "none", "logit_scale": 0.0390625 * 1.3, **ALL}),
        (WHOLE, False, {"aggregation": "none"}),
        (SLICED, True, {"recompute": True, "aggregation": "task", "logit_softcap": 1.5}),
        (SLICED, False, {"differentiable_tasks": True, "label_smoothing": 0.2, "aggregation": "sum"}),
    ],
)
def test_float32(chunk_size: int | None, with_bias: bool, options: dict, plans) -> None:  # noqa: F811
    # Products of the same size whatever they are multiplied by.
    p = make_problem(SHAPE, D=D, V=V, sharpness=2.0 / options.get("logit_scale", 1.0))
    compare(p, FP32, with_bias, chunk_size=chunk_size, **options)
    assert {slices for *_, slices in plans} == {1 if chunk_size is WHOLE else 3}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    ("chunk_size", "options"),
    [
        (WHOLE, {}),
        (SLICED, {"label_smoothing": 0.2}),
        (SLICED, {"logit_softcap": 1.5}),
        (SLICED, {"aggregation": "none"}),
        (SLICED, ALL),
    ],
)
def test_16_bits(dtype: torch.dtype, chunk_size: int | None, options: dict) -> None:
    p = make_problem(SHAPE, D=D, V=V, sharpness=2.0, dtype=dtype)
    compare(p, TOLERANCE[dtype], True, chunk_size=chunk_size, **options)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 24), (torch.bfloat16, 24), (torch.float16, 16)])
@pytest.mark.parametrize("descriptors", [False, True])
def test_rows_without_a_place_are_computed_again(
    monkeypatch: pytest.MonkeyPatch,
    plans,  # noqa: F811
    dtype: torch.dtype,
    width: int,
    descriptors: bool,
) -> None:
    """More rows than find room in the memory of dW: the others are computed again.

    The 48 or 64 supervised rows end on a step of the product over rows, behind which lie packed rows that are none.
    """
    monkeypatch.setattr(head, "can_use_tma", lambda _: descriptors)
    p = make_problem((2, 40), D=width, V=V, sharpness=2.0, dtype=dtype, ignored=0.0)
    p.labels.view(-1)[::5] = -100
    p.labels.view(-1)[[1, 2, 3, 4, 6, 7, 8, 9, 11, 12, 13, 14, 16, 17, 18, 19][: 0 if width == 16 else 16]] = -100
    assert int((p.labels >= 0).sum()) == (64 if width == 16 else 48)
    compare(p, TOLERANCE[dtype], True, chunk_size=8, label_smoothing=0.1)
    assert plans == [(80, 16, 0, 3)]


@pytest.mark.parametrize("supervised", [10, 20, 32, 33, 57, 80])  # they end in the first kind, in the second, ...
@pytest.mark.parametrize("descriptors", [False, True])
def test_rows_are_stored_held_and_computed_again(
    monkeypatch: pytest.MonkeyPatch,
    plans,  # noqa: F811
    descriptors: bool,
    supervised: int,
) -> None:
    """Of 80 rows 16 wait in the memory of dW, 16 in the workspace, and the other 48 are computed again."""
    monkeypatch.setattr(head, "can_use_tma", lambda _: descriptors)
    p = make_problem((2, 40), D=24, V=V, sharpness=2.0, dtype=torch.bfloat16, ignored=0.0)
    p.labels.view(-1)[torch.randperm(80, generator=torch.Generator().manual_seed(0))[supervised:]] = -100
    options = {"chunk_size": 40, "label_smoothing": 0.1}
    out = compare(p, TOLERANCE[torch.bfloat16], True, **options)
    assert plans == [(80, 16, 16, 3)]
    again = linear_task_cross_entropy(*p.tensors, bias=p.bias, backend="interpreter", **options)
    inputs = (p.hidden, p.weight, p.bias)
    for first, second in zip(gradients(out, *inputs), gradients(again, *inputs), strict=True):
        assert torch.equal(first, second)


def test_all_rows_have_a_place_without_as_much_workspace_as_logits(plans) -> None:  # noqa: F811
    """48 of 64 in the memory of dW, the others held: nothing is computed again."""
    p = make_problem((2, 32), D=64, V=V, sharpness=2.0, ignored=0.0)
    compare(p, FP32, chunk_size=42)
    assert plans == [(64, 48, 16, 3)]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"softcap": 3.0, "smoothing": 0.1, "z_loss": 0.01, "scale": 0.7}),
        (torch.float16, {"smoothing": 0.1, "scale": 2.6}),
        (torch.bfloat16, {"smoothing": 0.1, "scale": 2.6}),
    ],
    ids=str,
)
def test_shards_of_a_vocabulary(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, options: dict) -> None:
    """Targets elsewhere, statistics of the whole; slices within the shards; 16 bits through descriptors."""
    rounding = 0.0 if dtype == torch.float32 else TOLERANCE[dtype] / 2
    monkeypatch.setattr(head, "can_use_tma", lambda _: rounding > 0)
    p = make_problem((2, 15), D=D, V=V, dtype=dtype, sharpness=2.0)
    vocabulary_shards.check_shards(BACKEND, p, options, with_bias=bool(options), chunk_size=8, rounding=rounding)


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"aggregation": "none", **ALL}], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_tensor_descriptors(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, options: dict) -> None:
    monkeypatch.setattr(head, "can_use_tma", lambda _: True)
    p = make_problem(SHAPE, D=D, V=V, sharpness=2.0, dtype=dtype)
    compare(p, TOLERANCE[dtype], True, chunk_size=SLICED, **options)


@pytest.mark.parametrize(
    ("with_bias", "options"), [(True, {}), (False, {"label_smoothing": 0.1, "z_loss": 0.01}), (True, ALL)], ids=str
)
def test_frozen_head_goes_by_windows_of_rows(with_bias: bool, options: dict) -> None:
    p = make_problem(SHAPE, D=D, V=V, sharpness=2.0)
    p.weight.requires_grad_(False)
    compare(p, FP32, with_bias, chunk_size=17, **options)  # windows of 16, 16, 16 and 2 positions


def test_frozen_trunk() -> None:
    p = make_problem(SHAPE, D=D, V=V, sharpness=2.0)
    p.hidden.requires_grad_(False)
    compare(p, FP32, True, chunk_size=SLICED)


def test_only_the_bias_or_nothing_needs_a_gradient() -> None:
    p = make_problem(SHAPE, D=D, V=V)
    p.hidden.requires_grad_(False)
    p.weight.requires_grad_(False)
    compare(p, FP32, True, chunk_size=SLICED)
    with torch.no_grad():
        out = linear_task_cross_entropy(*p.tensors, backend="interpreter")
    assert not out.loss.requires_grad
    assert error(out.loss, reference_linear_task_cross_entropy(*p.tensors).loss) <= FP32


def test_statistics_go_by_windows_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile statistics of a loss alone are bounded too: 5 tiles of 32, 8 bytes each, 11 rows at a time."""
    monkeypatch.setattr(head, "WORKSPACE_BYTES", 4 * 11 * 5 * 8)
    p = make_problem(SHAPE, D=D, V=V, sharpness=2.0)
    compare(p, FP32, recompute=True)


def test_differentiable_tasks_take_any_mixture() -> None:
    p = make_problem(SHAPE, D=D, V=V)
    mix = torch.tensor([0.3, -1.0, 2.0, 0.7])
    out = linear_task_cross_entropy(*p.tensors, differentiable_tasks=True, chunk_size=SLICED, backend="interpreter")
    expected = reference_linear_task_cross_entropy(*p.tensors)
    total, wanted = (o.loss + (mix * o.task_loss).sum() for o in (out, expected))
    inputs = (p.hidden, p.weight)
    for a, b in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        assert error(a, b) <= FP32


@pytest.mark.parametrize("options", [{}, {"aggregation": "none", "logit_scale": 2.6, **ALL}], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 31, 150])  # one column, one ragged block of 32, several
def test_existing_logits(options: dict, vocab_size: int) -> None:
    p = make_problem((2, 7), D=9, V=vocab_size, sharpness=2.0)
    logits = (p.hidden @ p.weight.t()).detach().requires_grad_()
    arguments = (logits, p.labels, p.task_ids, p.task_weights)
    expected = reference_task_cross_entropy(*arguments, **options)
    out = task_cross_entropy(*arguments, backend="interpreter", **options)
    for name in ("loss", "task_loss", "lse"):
        assert error(getattr(out, name), getattr(expected, name)) <= FP32
    assert out.task_correct.tolist() == expected.task_correct.tolist()
    (actual,), (wanted,) = gradients(out, logits), gradients(expected, logits)
    # One word only: the gradient is z-loss alone, or zero.
    assert error(actual, wanted) <= FP32 or float((actual - wanted).abs().max()) <= 1e-6


def test_existing_logits_that_are_equal_or_forbidden() -> None:
    """Five blocks of a few integers, some -inf from the first block on: the first of the largest is the hit."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (40, 150), generator=generator).float()
    logits[torch.rand(40, 150, generator=generator) < 0.4] = float("-inf")
    first = torch.from_numpy(logits.numpy().argmax(1))
    last = 149 - torch.from_numpy(logits.flip(1).numpy().argmax(1))
    assert bool((first < last).all())
    tasks, ones = torch.zeros(40, dtype=torch.int64), torch.ones(1)
    expected = torch.nn.functional.cross_entropy(logits.double(), first)
    for labels, hits in ((first, 40), (last, 0)):
        out = task_cross_entropy(logits, labels, tasks, ones, shift=False, backend="interpreter")
        assert out.task_correct.tolist() == [hits]
        assert error(out.loss, expected) <= FP32


@pytest.mark.parametrize("sharpness", [0.5, 16.0])  # from nearly uniform to nearly certain
@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", NARROW)
def test_16_bits_are_no_worse_than_materialising(dtype: torch.dtype, sharpness: float, options: dict) -> None:
    """The bound of the design: error at most that of 16-bit logits, even with a float64 softmax behind them."""
    p = make_problem(SHAPE, D=D, V=V, dtype=dtype, sharpness=sharpness)
    inputs = (p.hidden, p.weight)
    materialised = reference_task_cross_entropy(p.hidden @ p.weight.t(), *p.tensors[2:])
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = gradients(reference_linear_task_cross_entropy(*wide, *p.tensors[2:]), *wide)
    out = linear_task_cross_entropy(*p.tensors, backend="interpreter", chunk_size=SLICED, **options)
    for actual, baseline, wanted in zip(gradients(out, *inputs), gradients(materialised, *inputs), exact, strict=True):
        assert actual.dtype == dtype
        assert error(actual, wanted) <= error(baseline, wanted)
