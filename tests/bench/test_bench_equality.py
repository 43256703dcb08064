"""The check accepts whoever computes Eq. 2, in any rounding, and rejects whoever does not."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import HEADS, Head, LinearCase, LogitsCase
from bench.equality import NotEqualError, deviations, evaluate, exact, limits, require_equal
from bench.linear import check, loss_of
from bench.peers import all_peers
from bench.peers.base import Peer, UnsupportedError, Weighting
from bench.peers.eager import Eager
from bench.problems import Problem, make

CPU = torch.device("cpu")
Loss = Callable[[Tensor, Tensor, Tensor, Weighting | None], Tensor]


@pytest.fixture(autouse=True)
def small_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a multiple of anything, several blocks of the peers' chunks of the vocabulary."""
    monkeypatch.setitem(HEADS, "odd", Head("odd", 8999, 37))


class Given(Peer):
    """A peer made of a function."""

    materialises = False
    about = "a test's own"

    def __init__(self, name: str, function: Loss) -> None:
        self.name, self.function = name, function

    def loss(self, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
        return self.function(hidden_MD, weight_VD, labels_M, weighting)


def plain(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weighting: Weighting | None) -> Tensor:
    return Eager().loss(hidden_MD, weight_VD, labels_M, weighting)


def divided_by_all_positions(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, _: Weighting | None) -> Tensor:
    return F.cross_entropy(hidden_MD @ weight_VD.t(), labels_M, reduction="sum") / len(labels_M)


def without_the_last_row(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, _: Weighting | None) -> Tensor:
    rows_N = (labels_M >= 0).nonzero().squeeze(1)[:-1]
    return F.cross_entropy(hidden_MD[rows_N] @ weight_VD.t(), labels_M[rows_N])


def ignored_rows_too(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, _: Weighting | None) -> Tensor:
    return F.cross_entropy(hidden_MD @ weight_VD.t(), labels_M.clamp(min=0))


def without_weight_gradient(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, _: Weighting | None) -> Tensor:
    return F.cross_entropy(hidden_MD @ weight_VD.detach().t(), labels_M)


def without_the_last_word(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, _: Weighting | None) -> Tensor:
    logits_MV = torch.cat([(hidden_MD @ weight_VD.t())[:, :-1], (hidden_MD @ weight_VD[-1:].detach().t())], 1)
    return F.cross_entropy(logits_MV, labels_M)


class _DeafToUpstream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        return torch.ones_like(gradients[0])


def deaf_to_upstream(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, _: Weighting | None) -> Tensor:
    return _DeafToUpstream.apply(F.cross_entropy(hidden_MD @ weight_VD.t(), labels_M))  # type: ignore[no-untyped-call]


def unweighted(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, _: Weighting | None) -> Tensor:
    return F.cross_entropy(hidden_MD @ weight_VD.t(), labels_M)


def mean_over_unweighted_count(
    hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, weighting: Weighting | None
) -> Tensor:
    assert weighting is not None
    losses_M = F.cross_entropy(hidden_MD @ weight_VD.t(), labels_M, reduction="none")
    return (losses_M * weighting.task_weights_K[weighting.task_ids_M]).sum() / (labels_M >= 0).sum()


def not_a_number(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, _: Weighting | None) -> Tensor:
    return plain(hidden_MD, weight_VD, labels_M, None) * torch.nan


@pytest.mark.parametrize(
    ("function", "tasks", "named"),
    [
        (divided_by_all_positions, 0, "loss is off"),
        (without_the_last_row, 0, "scores is off"),
        (ignored_rows_too, 0, "loss is off"),
        (without_weight_gradient, 0, "no gradient for weight"),
        (without_the_last_word, 0, "weight is off"),
        (deaf_to_upstream, 0, r"scores is off by 1.0e\+00"),
        (unweighted, 5, "scores is off"),
        (mean_over_unweighted_count, 5, "scores is off"),
        (not_a_number, 0, "loss is off by nan"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_function_is_rejected(function: Loss, tasks: int, named: str, dtype: str) -> None:
    """In bfloat16 too, where the limit is widest. The last word is a label, or leaving it out would be rounding."""
    case = LinearCase("odd", 83, 0.4, tasks, dtype=dtype)
    problem = make(case, CPU)
    supervised = (problem.labels_M >= 0).nonzero().squeeze(1)
    problem.labels_M[supervised[0]] = case.V - 1
    entry = check(case, problem, [Given("broken", function), Eager()])["broken"]
    assert entry.status == "failed"
    assert entry.error is not None
    assert re.search(named, entry.error), entry.error


@pytest.mark.parametrize(  # every pair of two among the three
    ("dtype", "mode", "tasks"),
    [
        ("float32", "train", 0),
        ("float32", "frozen_head", 5),
        ("float32", "loss", 0),
        ("bfloat16", "train", 5),
        ("bfloat16", "frozen_head", 0),
        ("bfloat16", "loss", 5),
    ],
)
def test_every_peer_of_a_cpu_is_accepted(dtype: str, mode: str, tasks: int) -> None:
    case = LinearCase("odd", 83, 0.4, tasks, mode, dtype)
    # Compiling is slow and has a test of its own.
    peers = [peer for peer in all_peers() if "compile" not in peer.name]
    entries = check(case, make(case, CPU), peers)
    assert len(entries) == len(peers)
    assert [f"{name}: {entry.error}" for name, entry in entries.items() if entry.status == "failed"] == []
    ready = {name for name, entry in entries.items() if entry.status == "ok"}
    assert {"cotbal", "eager", "token chunks (torchtune-style)", "vocabulary chunks (TRL-style)"} <= ready
    assert all(entries[name].deviations for name in ready)


@pytest.mark.parametrize("tasks", [0, 3])
def test_loss_of_logits(tasks: int) -> None:
    case = LogitsCase(61, 1999, 0.3, tasks, "float32")
    entries = check(case, make(case, CPU), [peer for peer in all_peers() if "compile" not in peer.name])
    assert entries["cotbal"].status == entries["eager"].status == "ok"
    assert entries["token chunks (torchtune-style)"].status == "unsupported"
    assert entries["token chunks (torchtune-style)"].error == "has no loss of logits that exist"


@pytest.mark.parametrize("tasks", [0, 4])
@pytest.mark.parametrize("chunk_bytes", [8 * 8999 * 7, 2**30])
def test_exact_is_what_autograd_says_in_float64(monkeypatch: pytest.MonkeyPatch, tasks: int, chunk_bytes: int) -> None:
    """In several chunks and in one."""
    monkeypatch.setattr("bench.equality.CHUNK_BYTES", chunk_bytes)
    problem = make(LinearCase("odd", 83, 0.4, tasks, dtype="float32"), CPU)
    assert problem.weight_VD is not None
    found = exact(problem)
    hidden_MD, weight_VD = (leaf.detach().double().requires_grad_() for leaf in problem.leaves.values())
    weights_M = torch.ones(83, dtype=torch.float64)
    if problem.weighting is not None:
        weights_M = problem.weighting.task_weights_K.double()[problem.weighting.task_ids_M]
    kept_M = problem.labels_M >= 0
    losses_M = F.cross_entropy(hidden_MD @ weight_VD.t(), problem.labels_M, reduction="none")
    loss = (losses_M * weights_M * kept_M).sum() / (weights_M * kept_M).sum()
    loss.backward()
    # float64 sums over 8999 terms: 1e-12 is four orders above their rounding.
    for value, expected in [
        (found.loss, loss.detach()),
        (found.gradients["scores"], hidden_MD.grad),
        (found.gradients["weight"], weight_VD.grad),
    ]:
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-15)


def test_a_peer_that_raises_and_one_that_cannot_are_told_apart() -> None:
    def raising(*_: object) -> Tensor:
        raise RuntimeError("no kernel for this\nat line 3")

    def unable(*_: object) -> Tensor:
        raise UnsupportedError("has no reduction none")

    case = LinearCase("odd", 20, dtype="float32")
    entries = check(case, make(case, CPU), [Given("raising", raising), Given("unable", unable), Eager()])
    assert (entries["raising"].status, entries["raising"].error) == ("failed", "RuntimeError: no kernel for this")
    assert (entries["unable"].status, entries["unable"].error) == ("unsupported", "has no reduction none")
    assert entries["eager"].status == "ok"


def test_limits_follow_the_materialised_path_where_it_is_worse() -> None:
    assert limits({"loss": 0.5}, torch.float32, ["loss", "weight"]) == {"loss": 0.75, "weight": 2.2e-5}
    require_equal({"loss": 0.74, "weight": 0.0}, {"loss": 0.75, "weight": 2.2e-5})
    with pytest.raises(NotEqualError, match=r"weight is off by 1.0e-04 \(at most 2.2e-05\)"):
        require_equal({"loss": 0.0, "weight": 1e-4}, {"loss": 0.75, "weight": 2.2e-5})


def test_deviation_is_the_worst_row_over_the_largest() -> None:
    problem = Problem(torch.zeros(3, 2, requires_grad=True), None, torch.zeros(3, dtype=torch.int64), None)
    expected = exact(problem)
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    expected.gradients["scores"].copy_(rows)
    found = evaluate(problem, lambda: loss_of(Eager(), problem))
    found.gradients["scores"].copy_(rows + torch.tensor([[0.0, 0.0], [0.3, 0.4], [0.1, 0.0]]))
    assert deviations(found, expected)["scores"] == pytest.approx(0.1, rel=1e-6)  # 0.5 / 5


class _NarrowSum(torch.autograd.Function):
    """dX as the sum of blocks of 128 words, each added to memory in the dtype of the hidden states."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor
    ) -> Tensor:
        logits_MV = hidden_MD.float() @ weight_VD.float().t()
        ctx.save_for_backward(hidden_MD, weight_VD, labels_M, logits_MV)
        return F.cross_entropy(logits_MV, labels_M)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_MD, weight_VD, labels_M, logits_MV = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_MV = logits_MV.softmax(1) - F.one_hot(labels_M, logits_MV.shape[1])
        grad_MV = (grad_MV * upstream[0] / len(labels_M)).to(hidden_MD.dtype)
        grad_hidden_MD = torch.zeros_like(hidden_MD)
        for grad_MB, weight_BD in zip(grad_MV.split(128, 1), weight_VD.split(128), strict=True):
            grad_hidden_MD += (grad_MB.float() @ weight_BD.float()).to(hidden_MD.dtype)
        return grad_hidden_MD, (grad_MV.float().t() @ hidden_MD.float()).to(weight_VD.dtype), None


def test_sums_in_16_bits_need_an_allowance_that_still_rejects_another_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(HEADS, "many blocks", Head("many blocks", 32000, 512))
    case = LinearCase("many blocks", 24, dtype="bfloat16")
    problem = make(case, CPU)
    honest, narrow, wrong = (
        Given(name, lambda hidden, weight, labels, _: _NarrowSum.apply(hidden, weight, labels))
        for name in ("not said", "said", "wrong")
    )
    wrong.function = deaf_to_upstream
    narrow.sums_narrow = wrong.sums_narrow = True
    entries = check(case, problem, [Eager(), honest, narrow, wrong])
    assert str(entries["not said"].error).startswith("computes another function: scores is off by")
    assert entries["said"].status == "ok", entries["said"].error
    assert entries["said"].deviations is not None
    assert 0.011 < entries["said"].deviations["scores"] < 0.05
    assert "weight is off by 1.0e+00 (at most 1.0e-01)" in str(entries["wrong"].error)
