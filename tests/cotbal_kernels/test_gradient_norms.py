"""Per-task norms of the head's gradient against K backward passes in float64; one process and two with gloo."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks

import cotbal_kernels.gradient_norms as module
from cotbal_kernels import linear_task_cross_entropy
from cotbal_kernels.gradient_norms import head_gradient_norms, supervised_rows

K, D, V = 4, 8, 37
# float32 sums of a few hundred products of order 1, in another order than the reference: 2^-24 times about a hundred.
RELATIVE = 1e-5


def problem(shape=(3, 9), seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, D, generator=g).to(dtype)
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(99)).to(dtype)
    bias = torch.randn(V, generator=torch.Generator().manual_seed(98)).to(dtype)
    labels = torch.randint(0, V, shape, generator=g)
    labels[torch.rand(shape, generator=g) < 0.4] = -100
    tasks = torch.randint(0, K - 1, shape, generator=g)  # the last task is absent
    return hidden, weight, bias, labels, tasks


def brute_force(parts, weight, bias=None, softcap=None):
    """K separate backward passes over everything at once, float64."""
    norms = []
    for k in range(K):
        w = weight.double().clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for hidden, labels, tasks in parts:
            z = F.linear(hidden[:, :-1].double(), w, None if bias is None else bias.double())
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            targets = labels[:, 1:].masked_fill(tasks[:, 1:] != k, -100)
            total = total + F.cross_entropy(z.transpose(1, 2), targets, reduction="sum", ignore_index=-100)
        total.backward()
        norms.append(w.grad.norm())
    return torch.stack(norms)


def rows_of(hidden, weight, labels, tasks, **options):
    """As the training loop does it: the log-sum-exp comes from the loss."""
    out = linear_task_cross_entropy(hidden, weight, labels, tasks, torch.ones(K), shift=True, **options)
    return supervised_rows(hidden, out.lse, labels, tasks, shift=True)


@pytest.mark.parametrize("block_bytes", [1 << 27, 512])  # the vocabulary at once, and in blocks of a few columns
@pytest.mark.parametrize("width", [3, 40])  # tasks with fewer tokens than D = 8, and with more
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"logit_softcap": 2.0}])
def test_equals_a_backward_pass_per_task(monkeypatch, block_bytes, width, options) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", block_bytes)
    hidden, weight, bias, labels, tasks = problem((3, width), seed=width)
    options = options | ({"bias": bias} if "bias" in options else {})
    found = head_gradient_norms([rows_of(hidden, weight, labels, tasks, **options)], weight, K, **options)
    expected = brute_force([(hidden, labels, tasks)], weight, options.get("bias"), options.get("logit_softcap"))
    torch.testing.assert_close(found, expected, rtol=RELATIVE, atol=1e-12)
    assert found[-1] == 0


def test_micro_batches_are_summed_before_the_norm() -> None:
    parts = [problem((2, 15), seed=s) for s in (1, 2)]
    weight = parts[0][1]
    rows = [rows_of(h, weight, labels, tasks) for h, _, _, labels, tasks in parts]
    expected = brute_force([(h, labels, tasks) for h, _, _, labels, tasks in parts], weight)
    torch.testing.assert_close(head_gradient_norms(rows, weight, K), expected, rtol=RELATIVE, atol=1e-12)
    apart = sum(head_gradient_norms([row], weight, K) for row in rows)
    assert (apart > 1.05 * expected)[:3].all()  # the sum of norms is another number


def test_a_confident_token_keeps_its_small_gradient() -> None:
    """p - 1 is formed before anything is rounded: 1e-4 of a gradient is not lost beside p = 0.9999."""
    weight = torch.eye(V, D)
    hidden = torch.zeros(1, 2, D)
    hidden[0, 0, 3] = 13.0
    labels = torch.tensor([[-100, 3]])
    tasks = torch.zeros(1, 2, dtype=torch.int64)
    found = head_gradient_norms([rows_of(hidden, weight, labels, tasks)], weight, K)
    expected = brute_force([(hidden, labels, tasks)], weight)
    assert 0 < expected[0] < 2e-3
    # 1 - p is 36 exp(-13) = 8e-5; a log-sum-exp near 13 comes in float32 steps of 9.5e-7, half of which is 0.6 % of it.
    torch.testing.assert_close(found[0], expected[0], rtol=6e-3, atol=0)


@pytest.mark.parametrize("width", [9, 40])  # tasks with fewer tokens than D = 8, and with more
def test_bfloat16_inputs_are_accumulated_in_float32(width: int) -> None:
    hidden, weight, _, labels, tasks = problem((3, width), dtype=torch.bfloat16)
    found = head_gradient_norms([rows_of(hidden, weight, labels, tasks)], weight, K)
    torch.testing.assert_close(found, brute_force([(hidden, labels, tasks)], weight), rtol=RELATIVE, atol=1e-12)


def test_nothing_supervised() -> None:
    hidden, weight, _, labels, tasks = problem()
    rows = rows_of(hidden, weight, torch.full_like(labels, -100), tasks)
    assert head_gradient_norms([rows], weight, K).tolist() == [0.0] * K


CASES = [(dtype, silent) for dtype in (torch.float32, torch.bfloat16) for silent in (False, True)]


def on_rank(rank: int, _: int) -> dict[tuple[torch.dtype, bool], torch.Tensor]:
    found = {}
    for dtype, silent in CASES:  # with every token of rank 1 ignored it must still take part
        hidden, weight, _, labels, tasks = problem((2 + rank, 9), seed=rank, dtype=dtype)
        if silent and rank == 1:
            labels = torch.full_like(labels, -100)
        found[dtype, silent] = head_gradient_norms([rows_of(hidden, weight, labels, tasks)], weight, K)
    return found


def test_two_ranks_have_the_norm_of_the_summed_gradient(tmp_path: Path) -> None:
    results = run_on_ranks(on_rank, 2, tmp_path)
    for dtype, silent in CASES:
        parts = []
        for rank in range(1 if silent else 2):
            hidden, weight, _, labels, tasks = problem((2 + rank, 9), seed=rank, dtype=dtype)
            parts.append((hidden, labels, tasks))
        assert torch.equal(results[0][dtype, silent], results[1][dtype, silent])
        torch.testing.assert_close(results[0][dtype, silent], brute_force(parts, weight), rtol=RELATIVE, atol=1e-12)
