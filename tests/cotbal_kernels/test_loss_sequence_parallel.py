"""Positions of a sequence split over gloo ranks: losses and gradients of the whole sequence."""

import pytest
import torch
import torch.distributed as dist
from loss_problems import FP32, error
from loss_ranks import results
from sequence_cases import CONTIGUOUS, sequence_problem, zigzag

from cotbal_kernels import linear_task_cross_entropy, shift_targets_across_ranks
from cotbal_kernels.targets import shift_targets

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is missing in this build of torch")


@pytest.mark.parametrize("ranks", [2, 3])
def test_shifted_parts_are_parts_of_the_shifted(ranks: int) -> None:
    p = sequence_problem()
    labels, ids = p.labels.roll(-1, 1), p.task_ids.roll(-1, 1)
    labels[:, -1] = -100
    found = [of_rank["sequence"] for of_rank in results(ranks)]
    assert [part["labels"].shape[1] for part in found] == list(CONTIGUOUS[ranks])
    supervised = labels >= 0
    assert torch.equal(torch.cat([part["labels"] for part in found], 1), labels)
    assert torch.equal(torch.cat([part["ids"] for part in found], 1)[supervised], ids[supervised])
    # One task per sequence, int32 labels, the group of a device mesh.
    assert torch.equal(torch.cat([part["labels of rows"] for part in found], 1), labels)
    assert torch.equal(
        torch.cat([part["ids of rows"] for part in found], 1)[supervised],
        p.task_ids[:, :1].expand(labels.shape)[supervised],
    )


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("aggregation", ["token", "task"])
@pytest.mark.parametrize("split", ["contiguous", "zig-zag"])
def test_split_sequences_equal_whole_ones(split: str, aggregation: str, ranks: int) -> None:
    p = sequence_problem()
    out = linear_task_cross_entropy(*p.tensors, shift=True, aggregation=aggregation)
    hidden, weight, lam = torch.autograd.grad(out.loss, (p.hidden, p.weight, p.task_weights))
    start = 0
    for rank, of_rank in enumerate(results(ranks)):
        found = of_rank["sequence"]
        here = zigzag(rank, ranks)
        if split == "contiguous":
            here = torch.arange(start, start + CONTIGUOUS[ranks][rank])
            start += CONTIGUOUS[ranks][rank]
        key = f"{split} {aggregation}"
        assert found[f"{split} tokens"].tolist() == out.task_tokens.tolist()
        assert error(found[f"{key} loss"], out.loss) <= FP32
        assert error(found[f"{key} weight"], weight) <= FP32
        # d lambda is a small difference of terms of order one.
        assert float((found[f"{key} lam"] - lam).abs().max()) <= FP32
        # One rank of three has no position.
        largest = (found[f"{key} hidden"] - hidden[:, here]).abs().flatten().tolist()
        assert max(largest, default=0.0) <= FP32 * float(hidden.abs().max())


def test_one_process() -> None:
    p = sequence_problem()
    labels, ids = shift_targets_across_ranks(p.labels, p.task_ids, -100)
    wanted_labels, wanted_ids = shift_targets(p.labels, p.task_ids, -100)
    assert torch.equal(labels, wanted_labels)
    assert torch.equal(ids[labels >= 0], wanted_ids[labels >= 0])
    with pytest.raises(ValueError, match="labels must be integers"):
        shift_targets_across_ranks(p.labels.float(), p.task_ids)
