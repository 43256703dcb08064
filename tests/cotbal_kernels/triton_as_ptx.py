"""The Triton backend compiled for a GPU and run as PTX on the CPU, tiles, pipelines and descriptors included."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from ptx_on_cpu import compute_capability

from cotbal_kernels import backends, triton_backend
from cotbal_kernels.triton_kernels import configs
from cotbal_kernels.triton_kernels.ahead_of_time import LIMITS


def ptx_backend(capability: int) -> SimpleNamespace:
    """A backend to register, on a device of this compute capability with three multiprocessors."""

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with patch.object(configs, "limits_of", lambda _: LIMITS[capability]), compute_capability(capability):
                return function(*args)

        return call

    names = [name for name in dir(backends.Backend) if not name.startswith("_")]
    return SimpleNamespace(**{name: compiled(getattr(triton_backend, name)) for name in names})
