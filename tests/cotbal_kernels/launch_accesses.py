"""What compute-sanitizer's memcheck and a race check between programs would say of one launch of a kernel.

On a CPU the programs (blocks) of a launch run one after the other, so a result that needs that order looks right. Here
every access is noted with its program: memory outside every tensor that the kernel was given is an error, and so is
memory that one program stores and another one loads or stores. Atomic operations may meet each other, and plain ones
of the same program; what a program loads behind one that acquires is taken to be ordered by it.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

# Arguments of kernels that a program may load while another one stores them, because the result is the same: the
# envelope loads L_i(0) before or after it becomes L_i(t), and the ratio is 1 either way.
_BENIGN = {"convergence_step_kernel": ("initial_ptr",)}
_NOBODY, _SEVERAL, _ATOMIC = -1, -2, -3  # beside the numbers of programs


def memory_of(values: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """First and last address of the elements of every tensor among the arguments of a launch, row by row of matrices.

    What lies between the rows of a matrix belongs to nobody.
    """
    for value in values:
        if isinstance(value, tuple):
            yield from memory_of(value)
        elif isinstance(value, TensorDescriptor):
            yield from memory_of((value.base,))
        elif isinstance(value, torch.Tensor) and value.dim() == 2 and value.stride(0) > value.shape[1] > 0:
            for row in range(value.shape[0]):
                yield from memory_of((value[row],))
        elif isinstance(value, torch.Tensor) and value.numel():
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            yield value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()


class Accesses:
    """Who has loaded and stored each byte of a launch."""

    def __init__(self, kernel: str, arguments: Mapping[str, Any] | Iterable[Any]) -> None:
        """``arguments`` of a kernel of which something is known must have names."""
        self.kernel, self.program, self.ordered = kernel, 0, False
        named = arguments if isinstance(arguments, Mapping) else dict(enumerate(arguments))
        memory = memory_of(named.values())
        merged: list[tuple[int, int]] = []
        for start, end in sorted(memory):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        self.starts, self.ends = np.array(merged, dtype=np.int64).reshape(-1, 2).T
        # Byte i of a range has its place at its address less the shift of the range.
        sizes = -((self.starts - self.ends) // 16) * 16
        self.shifts = self.starts - np.concatenate([[0], np.cumsum(sizes)[:-1]]) if merged else self.starts
        self.writer = np.full(int(sizes.sum()), _NOBODY, dtype=np.int32)
        self.reader = np.full_like(self.writer, _NOBODY)
        self.benign = np.zeros(self.writer.shape, dtype=bool)
        for name in _BENIGN.get(kernel, ()):
            for start, end in memory_of((named[name],)):
                self.benign[self._places(np.array([start]), end - start, "load from")] = True

    def enter(self, program: int) -> None:
        """What follows is done by ``program``."""
        self.program, self.ordered = program, False

    def _places(self, addresses: np.ndarray, size: int, kind: str) -> np.ndarray:
        addresses = addresses.astype(np.int64)
        at = np.searchsorted(self.starts, addresses, side="right") - 1
        if addresses.size and (at.min() < 0 or (addresses + size > self.ends[at]).any()):
            raise AssertionError(f"{self.kernel}: {kind} memory outside every tensor that it was given")
        return ((addresses - self.shifts[at])[:, None] + np.arange(size)).ravel()

    def _by_others(self, seen: np.ndarray, program: int, places: np.ndarray | None = None) -> bool:
        others = (seen != _NOBODY) & (seen != program) & (seen != self.program)
        return bool(np.count_nonzero(others if places is None else others & ~self.benign[places]))

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Also the places of the bytes, in an order of its own."""
        places = self._places(addresses, size, "load from")
        if not self.ordered and self._by_others(self.writer[places], self.program, places):
            raise AssertionError(f"{self.kernel}: a program loads what another one stores in the same launch")
        seen = self.reader[places]
        self.reader[places] = np.where((seen == _NOBODY) | (seen == self.program), self.program, _SEVERAL)
        return places

    def store(self, addresses: np.ndarray, size: int) -> np.ndarray:
        return self._store(addresses, size, self.program)

    def atomic(self, addresses: np.ndarray, size: int, acquires: bool) -> np.ndarray:
        places = self._store(addresses, size, _ATOMIC)
        self.ordered |= acquires
        return places

    def _store(self, addresses: np.ndarray, size: int, program: int) -> np.ndarray:
        places = self._places(addresses, size, "store to")
        ordered = self.ordered and program != _ATOMIC
        if not ordered and self._by_others(self.writer[places], program):
            raise AssertionError(f"{self.kernel}: several programs store to the same memory")
        if not ordered and self._by_others(self.reader[places], program, places):
            raise AssertionError(f"{self.kernel}: a program loads what another one stores in the same launch")
        # What a program stores and then adds to atomically stays its own: another one might add before that store.
        own = (self.writer[places] == self.program) & (program == _ATOMIC)
        self.writer[places] = np.where(own, self.program, program)
        return places
