"""The kernels of csrc/ as nvcc compiles them for a GPU, run as PTX on the CPU; host code is that of the CPU build.

kernels = ptx_kernels("80")             # the launches alone; "90a" for Hopper
"""

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from launch_accesses import Accesses
from ptx_on_cpu.block import Block, Launch
from ptx_on_cpu.memory import GlobalMemory
from ptx_on_cpu.text import parse

from cotbal_kernels.cuda_kernels import build, library
from cotbal_kernels.cuda_kernels.library import KernelLibrary

from . import compile_for_cpu

_ELSEWHERE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t), ctypes.c_int,
)  # fmt: skip


PTX_FLAGS = (*(flag for flag in build.FLAGS if flag in ("-std=c++17", "-O3", "-lineinfo")), "-ptx")


class PtxKernels(KernelLibrary):
    """The launches of csrc/, whose blocks run as PTX for one architecture ("80", "90a")."""

    def __init__(self, path: Path, ptx: str) -> None:
        super().__init__(path, device_type="cpu")
        self.ptx, self._tensors, self._failure = ptx, [], None
        self.blocks: dict[tuple[str, int], Block] = {}
        self._callback = _ELSEWHERE(self._run)  # kept: the library calls it
        launches = (name for name, value in vars(KernelLibrary).items() if callable(value) and name[0] != "_")
        for name in launches:
            setattr(self, name, self._noting_tensors(getattr(self, name)))

    def _noting_tensors(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        """What ``launch`` takes a pointer of is what its kernel may access."""

        def noting(*args: Any) -> Any:
            self._tensors, self._failure, pointer = [], None, library._pointer

            def noted(tensor: torch.Tensor | None) -> int | None:
                self._tensors.append(tensor)
                return pointer(tensor)

            library._pointer = noted
            # One for all libraries of this source that are loaded: the loader unites inline variables.
            self._library.cotbal_launch_elsewhere(self._callback)
            try:
                return launch(*args)
            except RuntimeError:
                if self._failure is not None:
                    raise self._failure from None
                raise
            finally:
                library._pointer = pointer

        return noting

    def _run(self, name: bytes, blocks: int, threads: int, arguments: Any, sizes: Any, count: int) -> int:
        try:
            block = self._block(name.decode(), threads)
            offsets = block.entry.parameters.values()
            assert len(offsets) == count
            space = bytearray(max(offsets) + max(sizes[:count]))
            for offset, argument, size in zip(offsets, arguments[:count], sizes[:count], strict=True):
                space[offset : offset + size] = ctypes.string_at(argument, size)
            accesses = Accesses(block.entry.name, self._tensors)
            launch = Launch(GlobalMemory(accesses), bytes(space), {}, (blocks, 1, 1))
            block.run_all(launch)
        except Exception as error:  # it would be lost in the library
            traceback.print_exc()
            self._failure = error
            return 719  # cudaErrorLaunchFailure
        return 0

    @property
    def issued(self) -> int:
        """Operations of warps so far."""
        return sum(block.issued for block in self.blocks.values())

    def _block(self, name: str, threads: int) -> Block:
        if (name, threads) not in self.blocks:
            self.blocks[name, threads] = Block(replace(parse(self.ptx, name), threads=threads), 0)
        return self.blocks[name, threads]


@functools.cache
def ptx_kernels(architecture: str) -> PtxKernels:
    """The launches, compiled once per process."""
    directory = Path(tempfile.mkdtemp(prefix="cuda_as_ptx_"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    compile_for_cpu(directory / "host.so", host_only=True)
    return PtxKernels(directory / "host.so", compile_to_ptx(architecture, build.source_directory(), directory))


def compile_to_ptx(architecture: str, source: Path, directory: Path) -> str:
    """What nvcc makes of csrc/ (or a changed copy of it)."""
    output = directory / "kernels.ptx"
    command = [str(build.find_nvcc()), *PTX_FLAGS, f"-arch=compute_{architecture}"]
    subprocess.run([*command, str(source / "api.cu"), "-o", str(output)], check=True)
    return output.read_text()
