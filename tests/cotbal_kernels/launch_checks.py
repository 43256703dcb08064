"""What compute-sanitizer's memcheck and a race check between programs would say, for kernels in the interpreter.

The interpreter runs the programs of a launch one after the other, so a result that needs that order looks right. Here
every access of a launch is noted with its program: memory outside every tensor that the kernel was given is an error,
and so is memory that one program stores and another one loads or stores. Atomic operations may meet each other; what
a program loads behind one that acquires is taken to be ordered by it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

# Kernels whose programs may load what another one stores, and why the result is the same.
_BENIGN = {"convergence_step_kernel": "the envelope loads L_i(0) before or after it becomes L_i(t): the ratio is 1"}
_ATOMIC = -1  # the "program" of atomic operations
_ORIGINAL = {
    name: vars(InterpreterBuilder)[name]
    for name in ("set_grid_idx", "create_masked_load", "create_masked_store", "create_atomic_rmw")
}


def _storages(values: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """First and last address of the memory of every tensor among the arguments of a launch."""
    for value in values:
        if isinstance(value, tuple):
            yield from _storages(value)
        elif isinstance(value, TensorDescriptor):
            yield from _storages((value.base,))
        elif isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()


class Launch:
    """The accesses of one launch, by byte."""

    def __init__(self, kernel: str, arguments: Iterable[Any]) -> None:
        self.kernel = kernel
        self.memory = sorted(set(_storages(arguments)))
        self.program, self.ordered = 0, False
        self.loads: list[tuple[np.ndarray, int]] = []
        self.stores: list[tuple[np.ndarray, int]] = []

    def enter(self, program: int) -> None:
        self.program, self.ordered = program, False

    def note(self, to: list[tuple[np.ndarray, int]], pointers: TensorHandle, mask: np.ndarray, program: int) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        addresses = np.unique(pointers.data[np.broadcast_to(mask, pointers.data.shape)].astype(np.int64))
        inside = np.zeros(addresses.shape, dtype=bool)
        for first, end in self.memory:
            inside |= (addresses >= first) & (addresses + size <= end)
        if not inside.all():
            kind = "load from" if to is self.loads else "store to"
            raise AssertionError(f"{self.kernel}: {kind} memory outside every tensor that it was given")
        if not self.ordered:
            to.append(((addresses[:, None] + np.arange(size)).ravel(), program))

    def finish(self) -> None:
        """Raise if what one program stores is stored or loaded by another."""
        stored, by = _distinct(self.stores)
        if (stored[1:] == stored[:-1]).any():
            raise AssertionError(f"{self.kernel}: several programs store to the same memory")
        if self.kernel in _BENIGN:
            return
        loaded, reader = _distinct(self.loads)
        at = np.searchsorted(stored, loaded)
        met = at < stored.size
        met[met] = stored[at[met]] == loaded[met]
        if (by[at[met]] != reader[met]).any():
            raise AssertionError(f"{self.kernel}: a program loads what another one stores in the same launch")


def _distinct(accesses: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Address and program of every different pair, in ascending order."""
    if not accesses:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    address = np.concatenate([addresses for addresses, _ in accesses])
    program = np.concatenate([np.full(addresses.size, program) for addresses, program in accesses])
    order = np.lexsort((program, address))
    address, program = address[order], program[order]
    keep = np.ones(address.size, dtype=bool)
    keep[1:] = (address[1:] != address[:-1]) | (program[1:] != program[:-1])
    return address[keep], program[keep]


def _watching(launch: Launch) -> dict[str, Callable[..., Any]]:
    """Methods of ``InterpreterBuilder`` that tell ``launch`` what they do before they do it."""

    def set_grid_idx(builder: InterpreterBuilder, x: int, y: int, z: int) -> None:
        _, ny, nz = builder.grid_dim
        launch.enter((x * ny + y) * nz + z)
        _ORIGINAL["set_grid_idx"](builder, x, y, z)

    def create_masked_load(builder: InterpreterBuilder, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        launch.note(launch.loads, pointers, mask.data, launch.program)
        return _ORIGINAL["create_masked_load"](builder, pointers, mask, *rest, **options)

    def create_masked_store(builder: InterpreterBuilder, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launch.note(launch.stores, pointers, mask.data, launch.program)
        return _ORIGINAL["create_masked_store"](builder, pointers, value, mask, *rest)

    def create_atomic_rmw(
        builder: InterpreterBuilder, op: Any, pointers: Any, value: Any, mask: Any, semantics: Any, scope: Any
    ) -> Any:
        launch.note(launch.stores, pointers, mask.data, _ATOMIC)
        launch.ordered |= "ACQUIRE" in str(semantics)
        return _ORIGINAL["create_atomic_rmw"](builder, op, pointers, value, mask, semantics, scope)

    return {name: method for name, method in locals().items() if name in _ORIGINAL}


@contextmanager
def checked(kernel: str, arguments: Iterable[Any]) -> Iterator[None]:
    """Check the one launch that happens inside, and every access as it is made."""
    launch = Launch(kernel, arguments)
    for name, method in _watching(launch).items():
        setattr(InterpreterBuilder, name, method)
    try:
        yield
    finally:
        for name, method in _ORIGINAL.items():
            setattr(InterpreterBuilder, name, method)
    launch.finish()
