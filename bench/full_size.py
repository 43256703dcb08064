"""What steps of the Triton backend take at the sizes of real models, counted without a GPU.

Launches are recorded instead of executed, as on an H100; memory is allocated as there, but nobody writes to it. So what
is counted is what the backend asks for: bytes beside inputs and gradients, matrix products in units of
F = 2 N V D flop over the N supervised rows, and operators of PyTorch beside our launches.
"""

# Shapes: M positions, N supervised rows, D hidden width, V vocabulary.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from cotbal_kernels import backends, linear_task_cross_entropy, portable, triton_backend
from cotbal_kernels.triton_kernels import ahead_of_time, configs

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


@dataclass(frozen=True)
class Launch:
    """One launch with its sizes; no tensor, which would live longer than it does."""

    kernel: str
    values: dict[str, int]

    @property
    def flop(self) -> int:
        """Of the matrix product, over the rows that it is given."""
        if self.kernel not in ("project_kernel", "grad_hidden_kernel", "grad_weight_kernel"):
            return 0
        given = self.values
        return int(2 * given["row_count"] * (given["vocab_stop"] - given["vocab_start"]) * given["width"])


@contextmanager
def _recorded(launches: list[Launch]) -> Iterator[None]:
    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        values = {name: value for name, value in given.items() if isinstance(value, int)}
        launches.append(Launch(kernel.__name__, values))

    backends.register_backend("recorded", triton_backend)
    try:
        with (
            mock.patch.object(triton_backend, "prepare_targets", portable.prepare_targets),
            mock.patch.object(configs, "limits_of", mock.Mock(return_value=H100)),
            mock.patch.object(JITFunction, "run", record),
        ):
            yield
    finally:
        del backends.BACKENDS["recorded"]


def run(step: Step, watched: Callable[[], AbstractContextManager[Any]]) -> list[Launch]:
    """The launches of a step, made while ``watched()`` is entered."""
    hidden_MD = torch.empty(step.M, step.D, dtype=step.dtype, requires_grad=step.need[0])
    weight_VD = torch.empty(step.V, step.D, dtype=step.dtype, requires_grad=step.need[1])
    labels_M = torch.zeros(step.M, dtype=torch.int64)
    labels_M[step.N :] = -100
    task_ids_M, task_weights_K = torch.zeros_like(labels_M), torch.ones(2)
    launches: list[Launch] = []
    with _recorded(launches), watched():
        out = linear_task_cross_entropy(
            hidden_MD, weight_VD, labels_M, task_ids_M, task_weights_K, backend="recorded", **step.options
        )
        if any(step.need):
            out.loss.sum().backward()
    return launches


class Operators(TorchDispatchMode):
    """Counts the operators that write memory, from autograd and inside our ops too: on a GPU each is a launch.

    ``prepare_targets`` is one, a fill of the counts: its place is taken by the portable one here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cotbal" and func.overloadpacket.__name__ != "prepare_targets":
            with self:  # a mode is off while it is asked, and sees nothing of what an op does
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.count += _writes(func, args, out)
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
    return sum(launch.flop for launch in launches) / (2 * step.N * step.V * step.D)
