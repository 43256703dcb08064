"""What several gloo ranks compute, for the tests of the loss over ranks: they compute, the tests compare.

One start of the processes per number of ranks runs every case; what a rank found is kept in memory as
``results(ranks)[rank][case]``. Nothing is asserted on a rank: a rank that stopped would leave the others waiting.
"""

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from group_cases import run_groups
from loss_problems import Problem, make_problem
from ranks import run_on_ranks
from sequence_cases import run_sequence
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cotbal_kernels import (
    LinearTaskCrossEntropy,
    TaskLoss,
    backends,
    linear_task_cross_entropy,
    portable,
    sharded_head,
    vocabulary_parallel,
)

V = 67
UNEVEN = {2: (50, 17), 3: (40, 3, 24)}
AT_30 = {2: (30, 37), 3: (30, 7, 30)}
EVERYTHING = {"logit_softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 1.7}


@dataclass
class Case:
    """One call; ``sizes`` are the rows that each rank holds, those beyond V are padding of NaN."""

    options: dict = field(default_factory=dict)
    sizes: dict[int, tuple[int, ...]] = field(default_factory=lambda: UNEVEN)
    problem: dict = field(default_factory=dict)
    change: Callable[[Problem], None] = lambda p: None
    with_bias: bool = True

    def make(self) -> Problem:
        """The whole problem, without padding."""
        p = make_problem(**{"V": V, "sharpness": 2.0, **self.problem})
        self.change(p)
        return p


def _exact(p: Problem) -> None:
    """Make logits multiples of 2^-5, so that 1e4 is added to them without rounding in float32."""
    p.hidden.data = (p.hidden.data * 4).round() / 4
    p.weight.data = (p.weight.data * 8).round() / 8


def _offset(p: Problem, *, first: float, rest: float) -> None:
    _exact(p)
    p.bias.data[:30], p.bias.data[30:] = first, rest


def _labels_in(p: Problem, start: int, stop: int) -> None:
    p.labels[p.labels >= 0] = start + p.labels[p.labels >= 0] % (stop - start)


def _ties(p: Problem) -> None:
    """Logits are the bias: its maximum is in every shard, at 10, 45 and 60 (and 48), and the labels are these."""
    p.weight.data.zero_()
    p.bias.data[[10, 45, 48, 60]] = 9.0
    supervised = p.labels >= 0
    p.labels[supervised] = torch.tensor([10, 45, 48, 60])[torch.arange(int(supervised.sum())) % 4]


def _dead_shard(p: Problem) -> None:
    p.bias.data[40:] = -torch.inf
    _labels_in(p, 0, 40)


DOUBLE = {"dtype": torch.float64}
NONE = {"aggregation": "none"}  # without a normalizer, which is float32
CASES = {
    "plain": Case(),
    "no bias, small chunks": Case({"chunk_size": 7}, with_bias=False),
    **{f"{name}, every option": Case({"aggregation": name, **EVERYTHING}) for name in ("token", "task", "sum", "none")},
    **{f"float64 {name}": Case({**NONE, name: value}, problem=DOUBLE) for name, value in EVERYTHING.items()},
    "float64, every option": Case({**NONE, "shift": True, **EVERYTHING}, problem=DOUBLE),
    "float64, padding only": Case({**NONE, **EVERYTHING}, {2: (70, 10), 3: (40, 40, 20)}, DOUBLE),
    "padded last shard": Case(EVERYTHING, {2: (40, 40), 3: (24, 24, 24)}),
    "no rows at all": Case(EVERYTHING, {2: (0, V), 3: (33, 0, 34)}),
    "labels in one shard": Case(change=lambda p: _labels_in(p, 0, 30)),
    "labels in the last shard": Case({"label_smoothing": 0.1}, change=lambda p: _labels_in(p, 60, 67)),
    "all logits at 1e4": Case(change=lambda p: _offset(p, first=1e4, rest=1e4)),
    "all logits at -1e4": Case({"z_loss": 1e-6}, change=lambda p: _offset(p, first=-1e4, rest=-1e4)),
    "a shard far below": Case({"label_smoothing": 0.1}, AT_30, change=lambda p: _offset(p, first=-1e4, rest=0.0)),
    "a shard far above": Case({}, AT_30, change=lambda p: _offset(p, first=1e4, rest=0.0)),
    "a shard of -inf": Case({}, {2: (40, 27), 3: (20, 20, 27)}, change=_dead_shard),
    "argmax ties": Case(change=_ties),
    "bfloat16": Case(problem={"shape": (2, 40), "D": 64, "dtype": torch.bfloat16}),
    "bfloat16, every option": Case({"aggregation": "task", **EVERYTHING}, problem={"dtype": torch.bfloat16}),
    "float16, padding only": Case({}, {2: (70, 10), 3: (40, 40, 20)}, {"dtype": torch.float16}),
    "differentiable tasks": Case({"differentiable_tasks": True}),
    "max_tokens": Case({"max_tokens": 40}),
    "own normalizer": Case({"normalizer": 64.0, "recompute": True}),
    "all ignored": Case(problem={"ignored": 1.1}),
    "no positions": Case(problem={"shape": (0, 5)}),
}  # fmt: skip


def gradients(out: TaskLoss, inputs: list[Tensor]) -> list[Tensor]:
    """Of the loss with an upstream gradient that is not all ones, plus the task losses if they are differentiable."""
    upstream = torch.linspace(-1, 2, out.loss.numel(), dtype=out.loss.dtype).reshape(out.loss.shape)
    total = (out.loss * upstream).sum() if out.loss.dim() else 3 * out.loss
    if out.task_loss.requires_grad:
        total = total + (out.task_loss * torch.tensor([0.3, -1.0, 2.0, 0.7])).sum()
    return list(torch.autograd.grad(total, inputs))


def shard_of(p: Problem, sizes: tuple[int, ...], rank: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a rank, leaves; rows behind V are NaN."""
    padding = sum(sizes) - p.weight.shape[0]
    start = sum(sizes[:rank])
    weight = torch.cat([p.weight.detach(), p.weight.new_full((padding, p.weight.shape[1]), torch.nan)])
    bias = torch.cat([p.bias.detach(), p.bias.new_full((padding,), torch.nan)])
    own = slice(start, start + sizes[rank])
    return weight[own].clone().requires_grad_(), bias[own].clone().requires_grad_()


def run_case(case: Case, rank: int, ranks: int) -> dict[str, Tensor]:
    p, sizes = case.make(), case.sizes[ranks]
    weight, bias = shard_of(p, sizes, rank)
    vocab_size = V if sum(sizes) > V else None
    options = {**case.options, "bias": bias if case.with_bias else None, "vocab_size": vocab_size}
    out = linear_task_cross_entropy(p.hidden, weight, *p.tensors[2:], process_group=dist.group.WORLD, **options)
    found = dict(zip(TaskLoss._fields, (tensor.detach() for tensor in out), strict=True))
    inputs = {"hidden": p.hidden, "task_weights": p.task_weights, "weight": weight}
    if case.with_bias:
        inputs["bias"] = bias
    return found | dict(zip(inputs, gradients(out, list(inputs.values())), strict=True))


def _addmm_flop(total: object, left: list[int], right: list[int], **_: object) -> int:
    """The mode does not know the in-place form."""
    return 2 * left[0] * left[1] * right[1]


def run_frozen(rank: int, ranks: int) -> dict[str, Tensor]:
    """Combinations of what needs a gradient, with collectives counted: a frozen head, a frozen trunk, nothing."""
    found: dict[str, Tensor] = {}
    p = make_problem(ignored=0.8)
    weight, bias = shard_of(p, UNEVEN[ranks], rank)
    lam = p.task_weights.detach()
    sizes: dict[str, list[int]] = {}
    total = 0

    def counted(name: str):
        original = getattr(dist, name)

        def wrapper(*args, **kwargs):
            sizes[name].append((args[1] if name == "all_gather" else args[0]).numel())
            return original(*args, **kwargs)

        return mock.patch.object(dist, name, wrapper)

    flops = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flop})

    def with_flops(name: str):
        def wrapper(*args):
            nonlocal total
            with flops:  # starts again at 0; outside the op it would see none of its products
                found = getattr(portable, name)(*args)
            total += flops.get_total_flops()
            return found

        return wrapper

    counting = {name: with_flops(name) for name in ("linear_rows_forward", "linear_rows_backward")}
    others = {name: getattr(portable, name) for name in ("prepare_targets", "task_scales", "task_sums")}
    backends.register_backend("counting", SimpleNamespace(**others, **counting))
    for name, hidden, head in (
        ("all", p.hidden, weight),
        ("frozen head", p.hidden, weight.detach()),
        ("frozen trunk", p.hidden.detach(), weight),
        ("no grad", p.hidden, weight),
    ):
        sizes, total = {"all_gather": [], "all_reduce": []}, 0
        options = {"bias": bias.detach(), "process_group": dist.group.WORLD, "backend": "counting"}
        with counted("all_gather"), counted("all_reduce"):
            with torch.set_grad_enabled(name != "no grad"):
                out = linear_task_cross_entropy(hidden, head, p.labels, p.task_ids, lam, **options)
            if out.loss.requires_grad:
                out.loss.backward()
        found[name] = torch.tensor([sum(sizes["all_gather"]), sum(sizes["all_reduce"]), total])
        found[name + " calls"] = torch.tensor([len(sizes["all_gather"]), len(sizes["all_reduce"])])
        found[name + " loss"] = out.loss.detach()
        for key, leaf in (("hidden", p.hidden), ("weight", weight)):
            found[f"{name} {key}"] = torch.zeros(0) if leaf.grad is None else leaf.grad
            leaf.grad = None
    return found


def run_buffer(rank: int, ranks: int) -> dict[str, Tensor]:
    """``grad_weight_out`` on a padded shard, twice; and a task of weight zero, which is not computed."""
    p = make_problem()
    sizes = {2: (40, 40), 3: (24, 24, 24)}[ranks]
    weight, _ = shard_of(p, sizes, rank)
    buffer = torch.full_like(weight, 0.5).detach()
    lam = p.task_weights.detach().clone()
    lam[1] = 0
    for _ in range(2):
        out = LinearTaskCrossEntropy(lam)(
            p.hidden, weight, p.labels, p.task_ids, process_group=dist.group.WORLD, vocab_size=V
        )
        linear_task_cross_entropy(
            p.hidden.detach(), weight, p.labels, p.task_ids, lam,
            process_group=dist.group.WORLD, vocab_size=V, grad_weight_out=buffer,
        ).loss.backward()  # fmt: skip
    assert weight.grad is None
    out.loss.backward()
    return {"buffer": buffer, "weight": weight.grad, "loss": out.loss.detach(), "task_loss": out.task_loss}


def run_modes(rank: int, ranks: int) -> dict[str, Tensor]:
    """Autocast, checkpointing, inference, a second backward pass, a second derivative."""
    p = make_problem()
    weight, _ = shard_of(p, UNEVEN[ranks], rank)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_task_cross_entropy(hidden, weight, *p.tensors[2:], process_group=dist.group.WORLD).loss

    found = {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found["autocast"] = loss(p.hidden, weight).detach()
    found["by hand"] = loss(p.hidden.bfloat16(), weight.bfloat16()).detach()
    with torch.inference_mode():
        found["inference"] = loss(p.hidden, weight).clone()
    plain = loss(p.hidden, weight)
    found["plain"] = plain.detach()
    found["first"] = torch.autograd.grad(plain, p.hidden, retain_graph=True)[0]
    found["second"] = torch.autograd.grad(plain, p.hidden)[0]
    with mock.patch.object(vocabulary_parallel, "on_cpu", return_value=False):  # as on a GPU: how many rows is not read
        fewer = {"max_tokens": 40, "process_group": dist.group.WORLD}
        unread = linear_task_cross_entropy(p.hidden, weight, *p.tensors[2:], **fewer).loss
        found["unread"] = torch.autograd.grad(unread, p.hidden)[0]
    again = checkpoint(loss, p.hidden, weight, use_reentrant=False)
    found["checkpoint"] = torch.autograd.grad(again, p.hidden)[0]
    try:
        torch.autograd.grad(loss(p.hidden, weight), p.hidden, create_graph=True)
    except RuntimeError as error:
        found["create_graph"] = str(error)
    return found


def message(call: Callable[[], object]) -> str:
    with contextlib.suppress(RuntimeError):
        try:
            call()
        except ValueError as error:
            return str(error)
    return "no ValueError"


def run_errors(rank: int, ranks: int) -> dict[str, str]:
    p = make_problem()
    weight = shard_of(p, UNEVEN[ranks], rank)[0].detach()
    labels = p.labels.clone()
    labels[labels >= 0] = (labels[labels >= 0] + rank) % V
    last = rank == ranks - 1
    subset = dist.new_group([0, 1]) if ranks > 2 else dist.group.WORLD
    world = {"process_group": dist.group.WORLD}

    def call(weight: Tensor = weight, labels: Tensor = p.labels, rows: int = 3, **options: object) -> str:
        hidden = p.hidden.detach().to(weight.dtype)[:rows, :, : weight.shape[1]]
        arguments = (hidden, weight, labels[:rows], p.task_ids[:rows], p.task_weights)
        sharded_head._SHARDS.clear()  # as if it were the first call
        return message(lambda: linear_task_cross_entropy(*arguments, **{**world, **options}))

    with mock.patch.object(vocabulary_parallel, "on_cpu", return_value=False):  # as on a GPU, which does not wait
        poisoned = linear_task_cross_entropy(p.hidden.detach(), weight, labels, *p.tensors[3:], **world).loss.item()
        checked = call(labels=labels, check=True)
    return {
        "labels, without a wait": str(poisoned),
        "labels, checked": checked,
        "vocab_size": call(vocab_size=V + 1),
        "no vocab_size": call(vocab_size=0),
        "positions": call(rows=3 - rank),
        "vocab_size of a rank": call(vocab_size=V - rank),
        "dtype": call(weight.double() if last else weight),
        "width": call(weight[:, :-1] if last else weight),
        "labels": call(labels=labels),
        "label out of range": call(labels=torch.where(p.labels >= 0, V, -100)),
        "reference": call(backend="reference"),
        "no group": call(process_group="tp"),
        "no member": call(process_group=subset) if ranks > 2 and last else "",
    }


def run_one(rank: int, ranks: int) -> dict[str, Tensor]:
    """A group of one rank is the plain path; so is padding without a group."""
    groups = [dist.new_group([one]) for one in range(ranks)]
    p = make_problem()
    weight, bias = shard_of(p, (V + 9,), 0)
    found = {}
    for name, options in (("group", {"process_group": groups[rank]}), ("none", {})):
        out = linear_task_cross_entropy(p.hidden, weight, *p.tensors[2:], bias=bias, vocab_size=V, **options)
        for key, gradient in zip("hwb", torch.autograd.grad(out.loss, (p.hidden, weight, bias)), strict=True):
            found[f"{name} {key}"] = gradient
        found[name] = out.loss.detach()
    return found


def run_dtensor(rank: int, ranks: int) -> dict[str, object]:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    p = make_problem()
    mesh = init_device_mesh("cpu", (ranks,))
    alone = [dist.new_group([one]) for one in range(ranks)]
    square = init_device_mesh("cpu", (1, ranks))
    weight = distribute_tensor(p.weight.detach(), mesh, [Shard(0)]).requires_grad_()
    bias = distribute_tensor(p.bias.detach(), mesh, [Shard(0)]).requires_grad_()
    hidden = DTensor.from_local(p.hidden.detach(), mesh, [Replicate()]).requires_grad_()
    out = linear_task_cross_entropy(hidden, weight, *p.tensors[2:], bias=bias)
    out.loss.backward()
    plain = linear_task_cross_entropy(p.hidden, weight, *p.tensors[2:], bias=bias, process_group=mesh.get_group())

    def call(hidden: Tensor = hidden, weight: Tensor = weight, **options: object) -> str:
        return message(lambda: linear_task_cross_entropy(hidden, weight, *p.tensors[2:], **options))

    return {
        "loss": out.loss.detach(),
        "plain": plain.loss.detach(),
        "placements": [str(leaf.grad.placements) for leaf in (weight, bias, hidden)],
        "weight": weight.grad.full_tensor(),
        "bias": bias.grad.full_tensor(),
        "hidden": hidden.grad.to_local(),
        "replicated weight": call(weight=distribute_tensor(p.weight.detach(), mesh, [Replicate()])),
        "sharded width": call(weight=distribute_tensor(p.weight.detach(), mesh, [Shard(1)])),
        "two dimensions": call(weight=distribute_tensor(p.weight.detach(), square, [Shard(0), Shard(0)])),
        "sharded hidden": call(hidden=DTensor.from_local(p.hidden.detach(), mesh, [Shard(0)])),
        "replicated bias": call(bias=distribute_tensor(p.bias.detach(), mesh, [Replicate()])),
        "other group": call(process_group=alone[rank]),
        "bias of another kind": message(
            lambda: linear_task_cross_entropy(p.hidden, p.weight, *p.tensors[2:], bias=bias)
        ),
    }


OTHERS = {
    "frozen": run_frozen,
    "buffer": run_buffer,
    "modes": run_modes,
    "errors": run_errors,
    "one": run_one,
    "dtensor": run_dtensor,
    "sequence": run_sequence,
    "groups": run_groups,
}


def _on_rank(rank: int, ranks: int) -> dict[str, dict]:
    found: dict[str, dict] = {name: run_case(case, rank, ranks) for name, case in CASES.items()}
    return found | {name: run(rank, ranks) for name, run in OTHERS.items()}


@cache
def results(ranks: int) -> list[dict[str, dict]]:
    """What every rank found, by rank and case."""
    with tempfile.TemporaryDirectory() as folder:
        return run_on_ranks(_on_rank, ranks, Path(folder))
