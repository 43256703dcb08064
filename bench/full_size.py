"""What steps of the Triton backend take at the sizes of real models, counted without a GPU.

Launches are recorded instead of executed, as on an H100; memory is allocated as there, but nobody writes to it. So what
is counted is what the backend asks for: bytes beside inputs and gradients, matrix products in units of
F = 2 N V D flop over the N supervised rows, operators of PyTorch beside our launches, and reads of the host.
"""

# Shapes: M positions, N supervised rows, D hidden width, V vocabulary.

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cotbal_kernels import linear_task_cross_entropy
from cotbal_kernels.triton_kernels import ahead_of_time
from cotbal_kernels.triton_kernels.ahead_of_time import Launch

# Whatever makes the host wait for a value of the device.
SYNCHRONISING = (
    "item",
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "unique_dim",
    "_unique2",
)
H100 = ahead_of_time.LIMITS[90]._replace(multiprocessors=132)


@dataclass(frozen=True)
class Step:
    """One forward pass, and one backward pass where a gradient is wanted of (hidden, weight)."""

    M: int
    V: int
    D: int
    need: tuple[bool, bool] = (True, True)
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    supervised: int | None = None  # None: every position

    @property
    def N(self) -> int:
        return self.M if self.supervised is None else self.supervised


LLAMA, QWEN = (128_256, 4096), (151_936, 3584)
STEPS = {
    "train": Step(8192, *LLAMA),
    "train, 2816 rows of workspace": Step(8192, *LLAMA, options={"chunk_size": 2816}),
    "train, smoothing": Step(8192, *LLAMA, options={"label_smoothing": 0.1}),
    "train, twice as many": Step(16_384, *LLAMA),
    "train, few": Step(2048, *LLAMA),
    "train, 12%": Step(16_384, *LLAMA, options={"max_tokens": 1966}, supervised=1966),
    "train, Qwen2.5": Step(8192, *QWEN),
    "recompute": Step(8192, *LLAMA, options={"recompute": True}),
    "recompute, twice as many": Step(16_384, *LLAMA, options={"recompute": True}),
    "frozen head": Step(8192, *LLAMA, (True, False)),
    "frozen head, 12%": Step(16_384, *LLAMA, (True, False), {"max_tokens": 1966}, supervised=1966),
    "frozen head, soft cap and smoothing": Step(
        8192, *LLAMA, (True, False), {"logit_softcap": 30.0, "label_smoothing": 0.1}
    ),
    "frozen head, Qwen2.5": Step(8192, *QWEN, (True, False)),
    "frozen trunk": Step(8192, *LLAMA, (False, True)),
    "loss": Step(8192, *LLAMA, (False, False)),
}


def run(step: Step, watched: AbstractContextManager[Any]) -> list[Launch]:
    """The launches of a step, made inside of ``watched``."""
    hidden_MD = torch.empty(step.M, step.D, dtype=step.dtype, requires_grad=step.need[0])
    weight_VD = torch.empty(step.V, step.D, dtype=step.dtype, requires_grad=step.need[1])
    labels_M = torch.zeros(step.M, dtype=torch.int64)
    labels_M[step.N :] = -100
    task_ids_M, task_weights_K = torch.zeros_like(labels_M), torch.ones(2)
    with ahead_of_time.backend_on(H100) as backend, ahead_of_time.recorded() as launches, watched:
        out = linear_task_cross_entropy(
            hidden_MD, weight_VD, labels_M, task_ids_M, task_weights_K, backend=backend, **step.options
        )
        if any(step.need):
            out.loss.sum().backward()
    return launches


class Operators(TorchDispatchMode):
    """Counts operators that write memory, each a launch on a GPU, and those that make the host wait for a value of the
    device: from autograd and inside our ops too.

    ``prepare_targets`` counts as one that writes, a fill of the counts: its place is taken by the portable one here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.writing = self.synchronising = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cotbal" and func.overloadpacket.__name__ != "prepare_targets":
            with self:  # a mode is off while it is asked, and sees nothing of what an op does
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.writing += _writes(func, args, out)
        self.synchronising += func.overloadpacket.__name__ in SYNCHRONISING
        return out


def _writes(func: Any, args: Any, out: Any) -> bool:
    """Not where memory is only allocated, or the result lies in that of an argument: a view, a cast to the same."""
    if func.namespace == "cotbal" or func._schema.is_mutable:
        return True
    given, made = (
        {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor)}
        for tensors in (args, out)
    )
    return "empty" not in func.overloadpacket.__name__ and not made & given


def gradient_bytes(step: Step) -> int:
    """What the step returns: gradients in the dtype of their inputs."""
    return step.dtype.itemsize * step.D * (step.M * step.need[0] + step.V * step.need[1])


def products(step: Step, launches: list[Launch]) -> float:
    """Matrix products in units of F."""
    return sum(map(_flop, launches)) / (2 * step.N * step.V * step.D)


def _flop(launch: Launch) -> int:
    """Of the matrix product, over the rows that it is given."""
    if launch.kernel.__name__ not in ("project_kernel", "grad_hidden_kernel", "grad_weight_kernel"):
        return 0
    given = launch.integers
    return 2 * given["row_count"] * (given["vocab_stop"] - given["vocab_start"]) * given["width"]
