"""The kernels of csrc/ and the CUDA backend on a CPU, from the same source.

    backend = cpu_backend()                 # register_backend("cuda_on_cpu", backend)
    kernels = cpu_kernels()                 # the launches alone
    with schedule(SHUFFLED, seed=3): ...    # threads of a block take turns in another order

What this shows: indexing, barriers, order of sums, rounding, orchestration. What it cannot: speed, the last bits of
device functions, cuBLAS.
"""

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cotbal_kernels.cuda_backend import CudaBackend
from cotbal_kernels.cuda_kernels.build import source_directory
from cotbal_kernels.cuda_kernels.library import KernelLibrary

ASCENDING, DESCENDING, SHUFFLED = 0, 1, 2
_FLAGS = ("-std=c++17", "-O2", "-fno-strict-aliasing", "-shared", "-fPIC", "-U_FORTIFY_SOURCE")
_WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


def find_compiler() -> str | None:
    """CXX, g++ or c++."""
    names = (os.environ.get("CXX", ""), "g++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def compile_for_cpu(output: Path, source: Path | None = None, host_only: bool = False) -> None:
    """Build csrc/ (or a changed copy of it) with the host's compiler; warnings are errors."""
    compiler = find_compiler()
    assert compiler is not None, "no C++ compiler"
    defined = ("-DCOTBAL_HOST_ONLY",) if host_only else ()
    command = [compiler, *_FLAGS, *_WARNINGS, *defined, f"-I{Path(__file__).parent}", "-x", "c++"]
    command += [str((source or source_directory()) / "api.cu"), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@functools.cache
def cpu_kernels() -> KernelLibrary:
    """The launches, compiled once per process."""
    directory = tempfile.mkdtemp(prefix="cuda_on_cpu_")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    library = Path(directory) / "kernels.so"
    compile_for_cpu(library)
    return KernelLibrary(library, device_type="cpu")


@contextmanager
def schedule(order: int, seed: int = 1, kernels: KernelLibrary | None = None) -> Iterator[None]:
    """Let the threads of a block take turns in another order."""
    choose = ctypes.CDLL(str((kernels or cpu_kernels()).path)).cotbal_cpu_schedule
    choose.argtypes = [ctypes.c_int, ctypes.c_uint64]
    choose(order, seed)
    try:
        yield
    finally:
        choose(ASCENDING, 1)


class WideningProducts:
    """Products of float32 copies: what cuBLAS computes, up to the order of a sum."""

    def wide(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        assert out.dtype == torch.float32
        assert left.dtype == right.dtype
        out.copy_(left.float() @ right.float())

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        assert total.dtype == torch.float32
        assert left.dtype == right.dtype
        total += left.float() @ right.float()

    def rounded(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        assert left.dtype == right.dtype == out.dtype
        out.copy_(left.float() @ right.float())


def kernels_for(device: torch.device) -> KernelLibrary:
    """What a backend asks for, with the device of its tensors."""
    assert device.type == "cpu"
    return cpu_kernels()


def cpu_backend() -> CudaBackend:
    """The CUDA backend with kernels and products of the CPU."""
    return CudaBackend(kernels_for, WideningProducts())
