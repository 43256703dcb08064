"""What a rank computes that holds a part of the positions of every sequence; run by ``loss_ranks``."""

import torch
import torch.distributed as dist
from loss_problems import Problem, make_problem
from torch import Tensor

from cotbal_kernels import (
    global_normalizer,
    global_task_tokens,
    linear_task_cross_entropy,
    shift_targets_across_ranks,
)

# Positions of a sequence of 24 over the ranks: contiguous with an empty rank, and zig-zag as ring attention has it.
CONTIGUOUS = {2: (15, 9), 3: (13, 0, 11)}


def zigzag(rank: int, ranks: int) -> Tensor:
    chunks = torch.arange(24).chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


def sequence_problem() -> Problem:
    p = make_problem((3, 24), ignored=0.3)
    p.labels[1, 14:] = -100
    return p


def run_sequence(rank: int, ranks: int) -> dict[str, Tensor]:
    """Sequences split over the ranks, by both ways, with one normalizer over a group or a mesh."""
    p = sequence_problem()
    mesh, turned = (dist.device_mesh.init_device_mesh("cpu", shape) for shape in ((ranks, 1), (1, ranks)))
    start = sum(CONTIGUOUS[ranks][:rank])
    here = torch.arange(start, start + CONTIGUOUS[ranks][rank])
    # A label that is ignored may be positive, and one rank of three has no position.
    kept_labels = p.labels.masked_fill(p.labels == -100, 67)
    own_labels, own_ids = shift_targets_across_ranks(kept_labels[:, here], p.task_ids[:, here], ignore_index=67)
    own_labels = own_labels.masked_fill(own_labels == 67, -100)
    ids_S, third = p.task_ids[:, 0], torch.arange(24).chunk(ranks)[rank]  # no rank is empty
    of_rows, ids_of_rows = shift_targets_across_ranks(p.labels[:, third].int(), ids_S, group=mesh.get_group(0))
    whole_labels = torch.cat([p.labels[:, 1:], torch.full((3, 1), -100)], 1)
    whole_ids = p.task_ids.roll(-1, 1)
    there = zigzag(rank, ranks)
    found = {"labels": own_labels, "ids": own_ids, "labels of rows": of_rows, "ids of rows": ids_of_rows}
    for name, at, labels, ids in (
        ("contiguous", here, own_labels, own_ids),
        ("zig-zag", there, whole_labels[:, there], whole_ids[:, there]),
    ):
        for aggregation in ("token", "task"):
            group = mesh if aggregation == "task" else None
            norm = global_normalizer(labels, ids, p.task_weights, aggregation=aggregation, group=group)
            hidden = p.hidden.detach()[:, at].requires_grad_()
            out = linear_task_cross_entropy(
                hidden, p.weight, labels, ids, p.task_weights, aggregation=aggregation, normalizer=norm
            )
            parts = [out.loss.detach(), *torch.autograd.grad(out.loss, (p.weight, p.task_weights), retain_graph=True)]
            for part in parts:
                dist.all_reduce(part)
            key = f"{name} {aggregation}"
            found |= dict(zip((f"{key} loss", f"{key} weight", f"{key} lam"), parts, strict=True))
            found[f"{key} hidden"] = torch.autograd.grad(out.loss, hidden)[0]
        found[f"{name} tokens"] = global_task_tokens(labels, ids, 4, group=turned)
    return found
