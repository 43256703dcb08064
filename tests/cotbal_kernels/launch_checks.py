"""Every access of kernels in Triton's interpreter, checked by :mod:`launch_accesses`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from launch_accesses import Accesses
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_ORIGINAL = {
    name: vars(InterpreterBuilder)[name]
    for name in ("set_grid_idx", "create_masked_load", "create_masked_store", "create_atomic_rmw")
}


def _live(pointers: TensorHandle, mask: np.ndarray) -> tuple[np.ndarray, int]:
    """The addresses that are accessed, and how many bytes at each."""
    size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
    return pointers.data[np.broadcast_to(mask, pointers.data.shape)], size


def _watching(accesses: Accesses) -> dict[str, Callable[..., Any]]:
    """Methods of ``InterpreterBuilder`` that tell ``accesses`` what they do before they do it."""

    def set_grid_idx(builder: InterpreterBuilder, x: int, y: int, z: int) -> None:
        _, ny, nz = builder.grid_dim
        accesses.enter((x * ny + y) * nz + z)
        _ORIGINAL["set_grid_idx"](builder, x, y, z)

    def create_masked_load(builder: InterpreterBuilder, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        accesses.load(*_live(pointers, mask.data))
        return _ORIGINAL["create_masked_load"](builder, pointers, mask, *rest, **options)

    def create_masked_store(builder: InterpreterBuilder, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        accesses.store(*_live(pointers, mask.data))
        return _ORIGINAL["create_masked_store"](builder, pointers, value, mask, *rest)

    def create_atomic_rmw(
        builder: InterpreterBuilder, op: Any, pointers: Any, value: Any, mask: Any, semantics: Any, scope: Any
    ) -> Any:
        accesses.atomic(*_live(pointers, mask.data), acquires="ACQUIRE" in str(semantics))
        return _ORIGINAL["create_atomic_rmw"](builder, op, pointers, value, mask, semantics, scope)

    return {name: method for name, method in locals().items() if name in _ORIGINAL}


@contextmanager
def checked(kernel: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Check every access of the one launch that happens inside as it is made."""
    for name, method in _watching(Accesses(kernel, arguments)).items():
        setattr(InterpreterBuilder, name, method)
    try:
        yield
    finally:
        for name, method in _ORIGINAL.items():
            setattr(InterpreterBuilder, name, method)
