"""Which part of a head is here: plain local tensors, and the sizes of the parts on all ranks of a process group."""

# Shapes: D hidden width, V rows of the head here, R ranks.

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import validation

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Head(NamedTuple):
    """Plain local tensors of the call, the group that shares the vocabulary and the size of the vocabulary."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    grad_weight_out: Tensor | None
    group: dist.ProcessGroup | None
    vocab_size: int | None


class Shard(NamedTuple):
    """Which part of the vocabulary is here."""

    group: dist.ProcessGroup
    rank: int
    bounds: tuple[int, ...]  # R + 1 ascending ids, the last one is the size of the vocabulary
    bounds_on_device: Tensor  # the same, int64: nothing is copied to the device after the first call

    @property
    def vocab_size(self) -> int:
        return self.bounds[-1]

    @property
    def start(self) -> int:
        return self.bounds[self.rank]

    @property
    def rows(self) -> int:
        """Rows of the head here that are no padding."""
        return self.bounds[self.rank + 1] - self.start


def local_head(head: Head) -> Head:
    """Take the local tensors of DTensors, and the group from the device mesh of the weight.

    A gradient of ``to_local`` is a DTensor again, with the placements of its parameter.
    """
    validation.require_member("process_group", head.group)
    from_mesh = head.group
    if _is_dtensor(head.weight):
        from_mesh = _group_of_sharded("weight", head.weight)
        if head.group is not None and _members(head.group) != _members(from_mesh):
            raise ValueError(
                "process_group must be None or the group of the device mesh of weight, ranks "
                f"{_members(from_mesh)}, got ranks {_members(head.group)}"
            )
    for name, tensor in (("bias", head.bias), ("grad_weight_out", head.grad_weight_out)):
        if _is_dtensor(tensor) and (
            from_mesh is None or _members(_group_of_sharded(name, tensor)) != _members(from_mesh)
        ):
            raise ValueError(f"{name} must be sharded as weight is, got a DTensor that is not; pass {name}.to_local()")
    vocab_size = head.vocab_size
    if vocab_size is None and _is_dtensor(head.weight):
        vocab_size = head.weight.shape[0]
    return Head(
        _replicated("hidden", head.hidden),
        _local(head.weight),
        _local(head.bias),
        _local(head.grad_weight_out),
        from_mesh,
        vocab_size,
    )


def _is_dtensor(tensor: Any) -> bool:
    # By its attributes: the import of torch.distributed.tensor takes a second.
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def _local(tensor: Any) -> Any:
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def _replicated(name: str, tensor: Any) -> Any:
    if _is_dtensor(tensor) and not all(placement.is_replicate() for placement in tensor.placements):
        raise ValueError(
            f"{name} must be the same on all ranks: a plain tensor or a DTensor with placements [Replicate()], got "
            f"{list(tensor.placements)}; pass {name}.redistribute(placements=[Replicate()]) or {name}.full_tensor()"
        )
    return _local(tensor)


def _group_of_sharded(name: str, tensor: Any) -> dist.ProcessGroup:
    from torch.distributed.tensor import Shard as ShardPlacement

    if tuple(tensor.placements) != (ShardPlacement(0),):
        raise ValueError(
            f"{name} must be a plain tensor or a DTensor with placements [Shard(0)] on a device mesh of one dimension, "
            f"got {list(tensor.placements)}; pass {name}.full_tensor(), or shard its rows over the ranks that share "
            "the vocabulary"
        )
    group: dist.ProcessGroup = tensor.device_mesh.get_group()
    return group


def _members(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def place_head(head: Head) -> tuple[Head, "Shard | None"]:
    """Find the shard of the vocabulary that is here; where that is all of it, None and the head without its padding."""
    weight = head.weight
    if head.group is not None:
        shard = find_shard(head.group, weight, head.vocab_size, head.hidden.shape[:-1].numel())
        if len(shard.bounds) > 2:
            return head, shard
    if head.vocab_size is None or head.vocab_size == weight.shape[0]:
        return head, None
    if not 0 < head.vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size must be in [1, {weight.shape[0]}], the rows of weight, got {head.vocab_size}")
    bias, grad_weight_out = (
        None if tensor is None else tensor[: head.vocab_size] for tensor in (head.bias, head.grad_weight_out)
    )
    return head._replace(weight=weight[: head.vocab_size], bias=bias, grad_weight_out=grad_weight_out), None


_SHARDS: dict[tuple[Any, ...], Shard] = {}


@torch.compiler.disable
def find_shard(group: dist.ProcessGroup, weight_VD: Tensor, vocab_size: int | None, positions: int) -> Shard:
    """The part of the vocabulary that this rank holds: from the sizes of all shards, in the order of the ranks.

    They are gathered when a group is first used with a head of these sizes, which waits for the device, and are
    remembered: so all ranks have to make that call, and heads of one group whose shards are of equal size on one
    rank are expected to be on all. So is the number of positions gathered: batches that differ end the process, or
    never end, in the collectives that follow, where they have other sizes.

    Raises:
        ValueError: the shards do not fit together, they hold fewer rows than ``vocab_size``, or ranks have different
            numbers of positions. All ranks raise.
    """
    key = (group, *weight_VD.shape, weight_VD.dtype, weight_VD.device, vocab_size)
    if key not in _SHARDS:
        bounds = _gather_bounds(group, weight_VD, vocab_size, positions)
        _SHARDS[key] = Shard(group, dist.get_rank(group), bounds, torch.tensor(bounds, device=weight_VD.device))
    return _SHARDS[key]


def _gather_bounds(
    group: dist.ProcessGroup, weight_VD: Tensor, vocab_size: int | None, positions: int
) -> tuple[int, ...]:
    own = torch.tensor(
        [*weight_VD.shape, _DTYPES.index(weight_VD.dtype), -1 if vocab_size is None else vocab_size, positions],
        device=weight_VD.device,
    )
    sizes, widths, dtypes, wanted, counts = gather(own, group).t().tolist()
    dtype_names = [str(_DTYPES[index]) for index in dtypes]
    for name, values in (("weight must have one width D", widths), ("weight must have one dtype", dtype_names)):
        if len(set(values)) > 1:
            raise ValueError(f"{name} on all ranks of process_group, got {values} in the order of the ranks")
    if len(set(wanted)) > 1:
        shown = [None if size < 0 else size for size in wanted]
        raise ValueError(f"vocab_size must be the same on all ranks of process_group, got {shown}")
    if len(set(counts)) > 1:
        raise ValueError(
            f"hidden must have as many positions on all ranks of process_group, got {counts} in order of ranks: "
            "they share the vocabulary, not the batch. A weight that FSDP has sharded is to be gathered first"
        )
    total = sum(sizes)
    if vocab_size is None:
        vocab_size = total
    if not 0 < vocab_size <= total:
        raise ValueError(
            f"vocab_size must be in [1, {total}], the rows of weight on all ranks of process_group "
            f"({' + '.join(map(str, sizes))}), got {vocab_size}"
        )
    bounds = [0]
    for size in sizes:
        bounds.append(min(bounds[-1] + size, vocab_size))
    return tuple(bounds)


def gather(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``own`` of every rank, in the order of the ranks: ``[R, ...]``."""
    out = own.new_empty((dist.get_world_size(group), *own.shape))
    if own.numel():
        dist.all_gather(list(out.unbind()), own.contiguous(), group=group)
    return out
