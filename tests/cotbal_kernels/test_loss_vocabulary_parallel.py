"""A head split over gloo ranks, against the float64 reference of the whole head and the plain path.

The ranks compute in ``loss_ranks``, all cases in one start of two and one of three processes.
"""

import pytest
import torch
import torch.distributed as dist
from group_cases import data_of
from loss_problems import FP32, Problem, error, make_problem
from loss_ranks import CASES, UNEVEN, Case, V, gradients, results

from cotbal_kernels import TaskLoss, linear_task_cross_entropy
from cotbal_kernels.interface import TokenLoss
from cotbal_kernels.reference import reference_linear_task_cross_entropy
from cotbal_kernels.sharded_head import Shard
from cotbal_kernels.vocabulary_parallel import _combine

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is missing in this build of torch")
ANY_OPTION = ("chunk_size", "recompute", "max_tokens")  # of the op alone, the reference has none of them


def inputs_of(p: Problem, case: Case) -> list[torch.Tensor]:
    return [p.hidden, p.task_weights, p.weight, *([p.bias] if case.with_bias else [])]


def exact(case: Case) -> tuple[TaskLoss, list[torch.Tensor]]:
    """The float64 reference of the whole head, on float64 leaves."""
    p = case.make()
    for name in ("hidden", "weight", "bias"):
        setattr(p, name, getattr(p, name).detach().double().requires_grad_())
    options = {name: value for name, value in case.options.items() if name not in ANY_OPTION}
    wanted = options.pop("differentiable_tasks", False)
    out = reference_linear_task_cross_entropy(*p.tensors, bias=p.bias if case.with_bias else None, **options)
    found = gradients(out if wanted else out._replace(task_loss=out.task_loss.detach()), inputs_of(p, case))
    return out, found


def plain(case: Case) -> tuple[TaskLoss, list[torch.Tensor]]:
    """The same op without a group."""
    p = case.make()
    out = linear_task_cross_entropy(*p.tensors, bias=p.bias if case.with_bias else None, **case.options)
    return out, gradients(out, inputs_of(p, case))


def whole(found: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    """Gradients of all shards, checked to be 0 in the padding, without it."""
    together = torch.cat([of_rank[name] for of_rank in found])
    assert bool((together[V:] == 0).all())
    return together[:V]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, ranks: int) -> None:
    """Loss, counts, lse and every gradient; the same bits on all ranks."""
    case, found = CASES[name], [of_rank[name] for of_rank in results(ranks)]
    first = found[0]
    for of_rank in found[1:]:
        for key in first.keys() - {"weight", "bias"}:
            assert torch.equal(first[key], of_rank[key]), key
    (wanted, wanted_gradients), (unsharded, ordinary) = exact(case), plain(case)
    dtype = case.problem.get("dtype", torch.float32)
    fp = 1e-13 if dtype == torch.float64 else FP32
    if case.problem.get("shape") == (0, 5):
        assert first["loss"] == 0
    for key in ("loss", "task_loss", "lse"):
        assert first[key].dtype == getattr(unsharded, key).dtype
        assert error(first[key], getattr(wanted, key)) <= fp, key
        assert error(first[key], getattr(unsharded, key)) <= fp, key
    assert first["task_tokens"].tolist() == wanted.task_tokens.tolist()
    assert first["task_correct"].tolist() == unsharded.task_correct.tolist()
    keys = ["hidden", "task_weights", "weight", *(["bias"] if case.with_bias else [])]
    # The gradient of lambda, always float32, is a small difference of these terms: four of their roundings, and the
    # upstream gradient is 3.
    normalizer = float((case.make().task_weights.detach() * wanted.task_tokens).sum()) or 1.0
    terms = 3 * max(1.0, float(wanted.task_loss.detach().max()) / normalizer)
    for key, expected, baseline in zip(keys, wanted_gradients, ordinary, strict=True):
        actual = first[key] if key in ("hidden", "task_weights") else whole(found, key)
        assert actual.dtype == baseline.dtype
        if key == "task_weights":
            close = float((actual.double() - expected.double()).abs().max()) <= 4 * 2**-24 * terms
            assert close or error(actual, expected) <= FP32
        elif dtype in (torch.bfloat16, torch.float16):
            # Both are rounded once, from float32 values that differ in their last digits.
            assert error(actual, expected) <= error(baseline, expected) + FP32, key
            assert error(actual, expected) <= torch.finfo(dtype).eps / 2 + FP32, key
        else:
            assert error(actual, expected) <= fp, key


def test_the_cases_have_what_they_are_for() -> None:
    """Ties are hits for one label in four only; the far shard holds targets; the dead one none."""
    ties = CASES["argmax ties"].make()
    hits = results(3)[0]["argmax ties"]["task_correct"].sum()
    assert int(hits) == int((ties.labels == 10).sum()) > 0
    assert int((ties.labels == 45).sum()) > 0
    far = CASES["a shard far below"].make()
    assert bool(((far.labels >= 0) & (far.labels < 30)).any())
    assert results(2)[0]["a shard of -inf"]["loss"].isfinite()
    assert results(2)[0]["padded last shard"]["weight"].shape == (40, 24)


@pytest.mark.parametrize("ranks", [2, 3])
def test_cost_and_collectives(ranks: int) -> None:
    """One all_gather of four numbers per row forward; one all-reduce of the rows backward, where hidden has a gradient.

    Products: 4 F over the ranks with both gradients, of the computed rows only.
    """
    p = make_problem(ignored=0.8)
    M, D = p.labels.numel(), p.hidden.shape[-1]
    N = int((p.labels >= 0).sum())
    assert 0 < N < M / 2
    lam = p.task_weights.detach()
    reference = reference_linear_task_cross_entropy(*p.tensors[:4], lam, bias=p.bias)
    dX, dW = torch.autograd.grad(reference.loss, (p.hidden, p.weight))
    for rank, all_found in enumerate(results(ranks)):
        found, rows = all_found["frozen"], UNEVEN[ranks][rank]
        start = sum(UNEVEN[ranks][:rank])
        F = 2 * N * rows * D
        for name, reduced, flops in (
            ("all", N * D, 4 * F), ("frozen head", N * D, 3 * F), ("frozen trunk", 0, 3 * F), ("no grad", 0, F)
        ):  # fmt: skip
            assert error(found[f"{name} loss"], reference.loss) <= FP32
            # The layout of the vocabulary had been gathered by the cases before.
            assert found[f"{name} calls"].tolist() == [1, int(reduced > 0)]
            assert found[name].tolist() == [4 * M, reduced, flops]
            for key, exact_gradient in (("hidden", dX), ("weight", dW[start : start + rows])):
                missing = name == "no grad" or (name, key) in {("frozen head", "weight"), ("frozen trunk", "hidden")}
                actual = found[f"{name} {key}"]
                if missing:
                    assert actual.numel() == 0
                else:
                    difference = (actual.double() - exact_gradient.double()).abs().max()
                    assert float(difference) <= FP32 * float(dW.abs().max() if key == "weight" else dX.abs().max())


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradient_buffer_of_a_padded_shard(ranks: int) -> None:
    p = make_problem()
    lam = p.task_weights.detach().clone()
    lam[1] = 0
    reference = reference_linear_task_cross_entropy(*p.tensors[:4], lam)
    (wanted,) = torch.autograd.grad(reference.loss, p.weight)
    found = [of_rank["buffer"] for of_rank in results(ranks)]
    buffer = torch.cat([of_rank["buffer"] for of_rank in found])
    assert bool((buffer[V:] == 0.5).all())
    assert error(buffer[:V], 0.5 + 2 * wanted) <= FP32
    assert error(whole(found, "weight"), wanted) <= FP32
    assert error(found[0]["loss"], reference.loss) <= FP32
    assert found[0]["task_loss"][1] == 0  # of weight zero: not computed
    assert reference.task_loss[1] > 0


def test_autocast_checkpoint_inference_and_two_backward_passes() -> None:
    p = make_problem()
    exact_loss = reference_linear_task_cross_entropy(*p.tensors).loss
    (wanted,) = torch.autograd.grad(exact_loss, p.hidden)
    for of_rank in results(2):
        found = of_rank["modes"]
        assert torch.equal(found["autocast"], found["by hand"])
        assert not torch.equal(found["autocast"], found["plain"])
        assert torch.equal(found["inference"], found["plain"])
        assert error(found["plain"], exact_loss) <= FP32
        for name in ("first", "second", "unread", "checkpoint"):
            assert error(found[name], wanted) <= FP32
        assert "has no second derivative" in found["create_graph"]


def test_errors_come_on_all_ranks() -> None:
    for ranks, sizes in UNEVEN.items():
        for rank, all_found in enumerate(results(ranks)):
            found = all_found["errors"]
            shown = " + ".join(map(str, sizes))
            assert (
                f"vocab_size must be in [1, 67], the rows of weight on all ranks of process_group ({shown})"
                in (found["vocab_size"])
            )
            assert "vocab_size must be in [1, 67]" in found["no vocab_size"]
            counts = [51, 34, 17][:ranks]
            assert f"as many positions on all ranks of process_group, got {counts}" in found["positions"]
            assert "vocab_size must be the same on all ranks" in found["vocab_size of a rank"]
            assert "weight must have one dtype on all ranks" in found["dtype"]
            assert "'torch.float32', 'torch.float64'" in found["dtype"]
            assert "weight must have one width D on all ranks" in found["width"]
            assert "24, 23]" in found["width"]
            for name in ("labels", "labels, checked"):
                assert "labels must be the same on all ranks of process_group" in found[name]
            assert found["labels, without a wait"] == "nan"
            assert "labels must be in [0, 67) where supervised, got 67" in found["label out of range"]
            assert "process_group must be None with backend='reference'" in found["reference"]
            assert "process_group must be a torch.distributed.ProcessGroup" in found["no group"]
            assert "mesh.get_group()), got 'tp'" in found["no group"]
            if ranks == 3 and rank == 2:
                assert "the calling process is a member of" in found["no member"]


def test_groups_that_are_not_the_world() -> None:
    """Eq. 2 over rank 0 and either of the others, whose head is split; ranks and their numbers in a group differ."""
    found = [of_rank["groups"] for of_rank in results(3)]
    parts = [data_of(rank) for rank in (0, 1)]
    hidden = torch.cat([p.hidden.detach().flatten(0, 1) for p in parts]).requires_grad_()
    weight, lam = parts[0].weight, parts[0].task_weights.detach()
    labels, ids = (torch.cat([getattr(p, name).flatten() for p in parts]) for name in ("labels", "task_ids"))
    reference = reference_linear_task_cross_entropy(hidden, weight, labels, ids, lam)
    dX, dW = torch.autograd.grad(reference.loss, (hidden, weight))
    assert torch.equal(found[1]["loss"], found[2]["loss"])
    assert error(found[0]["loss"] + found[1]["loss"], reference.loss) <= FP32
    assert error(found[0]["weight"] + torch.cat([found[1]["weight"], found[2]["weight"]]), dW) <= FP32
    for of_rank in found[1:]:
        together = torch.cat([found[0]["hidden"].flatten(0, 1), of_rank["hidden"].flatten(0, 1)])
        assert error(together, dX) <= FP32
    norms = []
    for own in torch.eye(4):
        of_task = reference_linear_task_cross_entropy(hidden, weight, labels, ids, own, aggregation="sum")
        norms.append(torch.autograd.grad(of_task.loss, weight)[0].norm())
    shifted = make_problem((12,)).labels.roll(-1)
    shifted[-1] = -100
    for of_rank, here in ((found[0], slice(7)), (found[2], slice(7, None))):
        assert of_rank["tokens"].tolist() == of_rank["tokens of a mesh"].tolist() == reference.task_tokens.tolist()
        assert error(of_rank["norms"], torch.stack(norms)) <= FP32
        assert torch.equal(of_rank["shift"], shifted[here])
    for name in ("tokens", "tokens of a mesh", "norms", "shift"):  # of the rank that is in neither
        assert "group must be a torch.distributed.ProcessGroup that the calling process is" in found[1][name]


def test_one_rank_is_the_plain_path() -> None:
    p = make_problem()
    wanted = linear_task_cross_entropy(*p.tensors, bias=p.bias)
    expected = torch.autograd.grad(wanted.loss, (p.hidden, p.weight, p.bias))
    for of_rank in results(2):
        found = of_rank["one"]
        for name in ("group", "none"):
            assert torch.equal(found[name], wanted.loss)
            for key, gradient in zip("hwb", expected, strict=True):
                assert torch.equal(found[f"{name} {key}"][: len(gradient)], gradient)
                assert key == "h" or bool((found[f"{name} {key}"][V:] == 0).all())
    with pytest.raises(ValueError, match=r"vocab_size must be in \[1, 67\], the rows of weight, got 68"):
        linear_task_cross_entropy(*p.tensors, vocab_size=68)
    with pytest.raises(ValueError, match=r"vocab_size must be in \[1, 67\], the rows of weight, got 0"):
        linear_task_cross_entropy(*p.tensors, vocab_size=0)


@pytest.mark.parametrize("ranks", [2, 3])
def test_dtensor(ranks: int) -> None:
    p = make_problem()
    reference = reference_linear_task_cross_entropy(*p.tensors, bias=p.bias)
    wanted = torch.autograd.grad(reference.loss, (p.hidden, p.weight, p.bias))
    for of_rank in results(ranks):
        found = of_rank["dtensor"]
        assert error(found["loss"], reference.loss) <= FP32
        assert torch.equal(found["loss"], found["plain"])
        assert found["placements"] == ["(Shard(dim=0),)", "(Shard(dim=0),)", "(Replicate(),)"]
        for key, expected in zip(("hidden", "weight", "bias"), wanted, strict=True):
            assert error(found[key], expected) <= FP32
        for key, got in (
            ("replicated weight", "[Replicate()]"),
            ("sharded width", "[Shard(dim=1)]"),
            ("two dimensions", "[Shard(dim=0), Shard(dim=0)]"),
        ):
            assert f"placements [Shard(0)] on a device mesh of one dimension, got {got}" in found[key]
            assert "weight.full_tensor()" in found[key]
        assert "hidden must be the same on all ranks" in found["sharded hidden"]
        assert "hidden.redistribute(placements=[Replicate()])" in found["sharded hidden"]
        assert "bias must be a plain tensor or a DTensor with placements [Shard(0)]" in found["replicated bias"]
        assert f"the group of the device mesh of weight, ranks {list(range(ranks))}, got ranks" in found["other group"]
        assert "bias must be sharded as weight is" in found["bias of another kind"]


def test_ranks_with_other_labels_poison_the_loss() -> None:
    """What a GPU does where raising would synchronise: here the function that makes one loss of the shards' parts."""
    targets = torch.tensor([3, -1, 60])
    parts = torch.zeros(2, 4, 3)
    parts[:, 3] = torch.tensor([-4.0, 0.0, -61.0])
    shard = Shard(None, 0, (0, 50, 67), torch.tensor([0, 50, 67]))
    assert bool(_combine(parts, targets, shard, TokenLoss())[3])
    parts[1, 3, 2] = 61.0  # a hit: the same target
    assert bool(_combine(parts, targets, shard, TokenLoss())[3])
    parts[1, 3, 2] = -60.0
    assert not bool(_combine(parts, targets, shard, TokenLoss())[3])
