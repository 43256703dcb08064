"""The matrix products of the CUDA backend: cuBLAS through torch, always accumulated in float32.

A 16-bit product with a float32 result is an overload of ``mm`` that exists on CUDA alone (``out_dtype``, since torch
2.8). Adding to a float32 matrix in the same call (``addmm`` with ``out_dtype``) accepts a float32 summand only in
later releases: where it is refused, a block of the product at a time is added in a second step, to the same result up
to rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

# Bound on a float32 block of a product that has to be added in a second step.
BLOCK_BYTES = 64 * 2**20


class Products(Protocol):
    """``left [R, S] @ right [S, T]`` of one dtype into ``out [R, T]``, sums in float32."""

    def wide(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """``out = left @ right`` with ``out`` in float32, any row stride."""
        ...

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """``total += left @ right`` with ``total`` in float32."""
        ...

    def rounded(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """``out = left @ right`` with ``out`` in the dtype of ``left``, rounded once."""
        ...


class LibraryProducts:
    """cuBLAS. float32 products follow ``torch.backends.cuda.matmul.allow_tf32``, which is off by default."""

    def __init__(self) -> None:
        self._adds_in_place: dict[torch.dtype, bool] = {}

    def wide(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        if left.dtype == torch.float32:
            torch.mm(left, right, out=out)
        else:
            torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=out)

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        if left.dtype == torch.float32:
            total.addmm_(left, right)
        elif self._adds_in_place.get(left.dtype, True) and self._add_in_place(total, left, right):
            return
        else:
            step = max(1, BLOCK_BYTES // (4 * max(1, total.shape[1])))
            for start in range(0, total.shape[0], step):
                block = total[start : start + step]
                block += torch.ops.aten.mm.dtype(left[start : start + step], right, torch.float32)

    def _add_in_place(self, total: Tensor, left: Tensor, right: Tensor) -> bool:
        """False where this torch refuses the mixed dtypes, which it checks before it launches anything."""
        try:
            torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
        except RuntimeError as error:
            if "dtype" not in str(error):
                raise
            self._adds_in_place[left.dtype] = False
            return False
        return True

    def rounded(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        with _no_reduced_precision_reduction():
            torch.mm(left, right, out=out)


@contextmanager
def _no_reduced_precision_reduction() -> Iterator[None]:
    """Keep cuBLAS from adding parts of a sum in 16 bits, which it may by default: that would round more than once."""
    settings = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {}
    for name in names:
        split = getattr(settings, f"{name}_split_k", None)  # the second half of the setting in newer releases
        before[name] = getattr(settings, name) if split is None else (getattr(settings, name), split)
        setattr(settings, name, False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)
