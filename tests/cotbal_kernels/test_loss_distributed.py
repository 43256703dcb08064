"""The global normalizer: one process, and two with gloo."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from loss_problems import error, make_problem
from ranks import run_on_ranks

from cotbal_kernels import global_normalizer, global_task_tokens, linear_task_cross_entropy


def test_one_process() -> None:
    labels = torch.tensor([[1, 2, -100], [3, -100, 4]])
    ids = torch.tensor([[0, 1, 0], [2, 2, 2]])
    lam = torch.tensor([1.0, 2.0, 0.5, 7.0])
    assert global_task_tokens(labels, ids, 4).tolist() == [1, 1, 2, 0]
    assert float(global_normalizer(labels, ids, lam)) == 1 + 2 + 2 * 0.5
    assert float(global_normalizer(labels.masked_fill(labels < 0, 9), ids, lam, ignore_index=9)) == 1 + 2 + 2 * 0.5
    assert global_task_tokens(labels, ids * 0, 1).tolist() == [4]
    # task: T_k times the sum of lambda over the tasks present (1 + 2 + .5), 0 for the absent one
    assert global_normalizer(labels, ids, lam, aggregation="task").tolist() == [3.5, 3.5, 7.0, 0.0]
    # shifted: labels 2 (task 1) of the first row, 4 (task 2) of the second
    assert global_task_tokens(labels, ids, 4, shift=True).tolist() == [0, 1, 1, 0]
    assert global_normalizer(labels, ids, lam).dtype == torch.float32


def test_list_of_micro_batches_of_different_shapes() -> None:
    a, b = make_problem((3, 7), seed=1), make_problem((2, 11), seed=2)
    lam = a.task_weights.detach()
    labels, ids = [a.labels, b.labels], [a.task_ids, b.task_ids[:, 0]]
    counts = [global_task_tokens(x, y, 4, shift=True) for x, y in zip(labels, ids, strict=True)]
    assert torch.equal(global_task_tokens(labels, ids, 4, shift=True), sum(counts))
    together = global_normalizer(labels, ids, lam, shift=True)
    assert error(together, (lam * sum(counts)).sum()) <= 1e-6
    assert float(global_normalizer([torch.full((2, 3), -100)], [torch.zeros(2).long()], lam)) == 0


@pytest.mark.parametrize("aggregation", ["token", "task"])
def test_normalizer_is_the_one_of_the_loss(aggregation: str) -> None:
    p = make_problem()
    normalizer = global_normalizer(p.labels, p.task_ids, p.task_weights, aggregation=aggregation)
    given = linear_task_cross_entropy(*p.tensors, aggregation=aggregation, normalizer=normalizer)
    own = linear_task_cross_entropy(*p.tensors, aggregation=aggregation)
    assert error(given.loss, own.loss) <= 1e-6
    # differentiable in lambda, so d loss / d lambda is right with it too
    a, b = (torch.autograd.grad(o.loss, p.task_weights)[0] for o in (given, own))
    assert float((a - b).abs().max()) <= 1e-6


LAMBDA = [2.01, 1.0, 0.4]


def window(rank: int, silent_rank: bool):
    """Three micro-batches of a rank: tasks unevenly spread, rank 1 ignores everything in its last two."""
    p = make_problem((6, 10), K=3, ignored=0.5, seed=5 + rank)
    p.task_ids[:3] = rank
    if rank == 1:
        p.labels[0 if silent_rank else 2 :] = -100
    slices = [slice(0, 2), slice(2, 3), slice(3, 6)]
    return p, slices


def on_rank(rank: int, _: int) -> dict[tuple[bool, str], torch.Tensor]:
    lam = torch.tensor(LAMBDA)
    results = {}
    for silent_rank, aggregation in itertools.product((False, True), ("token", "task")):
        p, slices = window(rank, silent_rank)
        weight = make_problem(K=3).weight.detach().requires_grad_()
        normalizer = global_normalizer(
            [p.labels[s] for s in slices],
            [p.task_ids[s] for s in slices],
            lam,
            shift=True,
            aggregation=aggregation,
        )
        for s in slices:
            linear_task_cross_entropy(
                p.hidden[s],
                weight,
                p.labels[s],
                p.task_ids[s],
                lam,
                shift=True,
                aggregation=aggregation,
                normalizer=normalizer,
            ).loss.backward()
        dist.all_reduce(weight.grad)
        results[silent_rank, aggregation] = weight.grad
    return results


def test_two_ranks_times_three_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    """Including a rank whose tokens are all ignored, which must still take part."""
    results = run_on_ranks(on_rank, 2, tmp_path)
    for silent_rank, aggregation in itertools.product((False, True), ("token", "task")):
        parts = [window(rank, silent_rank)[0] for rank in range(2)]
        weight = make_problem(K=3).weight.detach().requires_grad_()
        whole = linear_task_cross_entropy(
            torch.cat([p.hidden for p in parts]),
            weight,
            torch.cat([p.labels for p in parts]),
            torch.cat([p.task_ids for p in parts]),
            torch.tensor(LAMBDA),
            shift=True,
            aggregation=aggregation,
        )
        (wanted,) = torch.autograd.grad(whole.loss, weight)
        for rank in range(2):
            assert error(results[rank][silent_rank, aggregation], wanted) <= 1e-6
