"""What a rank computes in groups that are not the world: rank 0 has other data than ranks 1 and 2, which share a head.

Run by ``loss_ranks`` on three ranks.
"""

import torch.distributed as dist
from loss_problems import Problem, make_problem
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cotbal_kernels import (
    global_normalizer,
    global_task_tokens,
    linear_task_cross_entropy,
    shift_targets_across_ranks,
)
from cotbal_kernels.gradient_norms import head_gradient_norms, supervised_rows

PARTS = {0: slice(None), 1: slice(40), 2: slice(40, None)}  # of the head's rows, on each rank


def data_of(rank: int) -> Problem:
    """Batches of other shapes, with one head and one lambda."""
    p, common = make_problem((3, 17) if rank == 0 else (2, 11), seed=40 + min(rank, 1)), make_problem()
    p.weight, p.task_weights = common.weight, common.task_weights
    return p


def run_groups(rank: int, ranks: int) -> dict[str, Tensor]:
    """Data parallelism of rank 0 and each of the others, tensor parallelism of those; what no member gets."""
    if ranks != 3:
        return {}
    head, near, far = (dist.new_group(members) for members in ([1, 2], [0, 1], [0, 2]))
    mesh = DeviceMesh("cpu", [0, 2])
    p, lam = data_of(rank), make_problem().task_weights.detach()
    groups = {0: (near, mesh), 1: (near,), 2: (mesh,)}[rank]
    for group in groups:
        normalizer = global_normalizer(p.labels, p.task_ids, lam, group=group)
    weight = p.weight.detach()[PARTS[rank]].requires_grad_()
    out = linear_task_cross_entropy(
        p.hidden, weight, p.labels, p.task_ids, lam, normalizer=normalizer, process_group=head if rank else None
    )
    out.loss.backward()
    rows = supervised_rows(p.hidden, out.lse, p.labels, p.task_ids)
    sequence, here = make_problem((12,)), slice(7) if rank == 0 else slice(7, None)
    calls = {
        "tokens": lambda: global_task_tokens(p.labels, p.task_ids, 4, group=far),
        "tokens of a mesh": lambda: global_task_tokens(p.labels, p.task_ids, 4, group=mesh),
        "norms": lambda: head_gradient_norms([rows], p.weight.detach(), 4, group=far),
        "shift": lambda: shift_targets_across_ranks(sequence.labels[here], sequence.task_ids[here], group=far)[0],
    }
    found = {"loss": out.loss.detach(), "hidden": p.hidden.grad, "weight": weight.grad}
    for name, call in calls.items():
        try:
            found[name] = call()
        except ValueError as error:
            found[name] = str(error)
    return found
