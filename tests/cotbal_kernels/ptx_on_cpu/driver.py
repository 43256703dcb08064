"""A device for Triton that is this CPU: kernels are specialised, compiled and launched as for a GPU; their PTX runs.

    with compute_capability(90):
        kernel[grid](tensor, 3, BLOCK=16)  # tensors on the CPU

Unlike in Triton's interpreter, what runs went through the compiler for that GPU: layouts, pipelines of asynchronous
copies, tensor cores with bfloat16, descriptors, arithmetic as the instructions have it.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import triton
from launch_accesses import Accesses
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager
from triton.tools.tensor_descriptor import TensorDescriptor

from cotbal_kernels.triton_kernels.ahead_of_time import LIMITS

from . import arithmetic, bits, blackwell, hopper, transfers, warps  # noqa: F401  what decodes registers itself
from .block import Block, Launch
from .memory import GlobalMemory
from .text import parse

_SPANS = {0: 16, 1: 32, 2: 64, 3: 128}  # of CUtensorMapSwizzle
_FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u32": "I", "u64": "Q", "fp32": "f"}


class Launcher:
    """Runs the blocks of a launch one after the other."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature, self.metadata = dict(source.signature), metadata
        files = get_cache_manager(metadata.hash).get_group(f"{metadata.name}.json")
        with open(files[f"{metadata.name}.ptx"]) as file:
            self.block = Block(parse(file.read()), metadata.shared)

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        arguments = rest[6:]  # behind stream, function, two kinds of metadata and two hooks
        accesses = Accesses(self.block.entry.name, dict(zip(self.signature, arguments, strict=True)))
        descriptors: dict[int, hopper.TensorMap] = {}
        parameters = self._parameters(arguments, descriptors)
        self.block.run_all(Launch(GlobalMemory(accesses), parameters, descriptors, (x, y, z)))

    def _parameters(self, arguments: tuple[Any, ...], descriptors: dict[int, hopper.TensorMap]) -> bytes:
        """The parameter space; tensor descriptors in it are put into ``descriptors`` by their place."""
        values: list[tuple[str, Any]] = []
        metadata = iter(getattr(self.metadata, "tensordesc_meta", None) or ())
        for kind, value in zip(self.signature.values(), arguments, strict=True):
            if kind == "constexpr":
                continue
            if isinstance(value, torch.Tensor):
                values.append(("Q", value.data_ptr()))
            elif isinstance(value, TensorDescriptor):
                values.append(("map", _tensor_map(value, next(metadata))))
                values += [("i", size) for size in value.shape] + [("q", stride) for stride in value.strides]
            else:
                values.append((_FORMATS[kind], value))
        space = bytearray(max(self.block.entry.parameters.values(), default=0) + 128)
        offsets = list(
            self.block.entry.parameters.values()
        )  # behind the arguments: scratch memory that no kernel here has
        for offset, (kind, value) in zip(offsets, values, strict=False):
            if kind == "map":
                descriptors[offset] = value
            else:
                struct.pack_into(f"<{kind}", space, offset, value)
        if not len(values) <= len(offsets) <= len(values) + 2:
            raise AssertionError(f"{self.block.entry.name}: {len(values)} arguments for {len(offsets)} parameters")
        return bytes(space)


def _tensor_map(descriptor: TensorDescriptor, meta: dict[str, Any]) -> hopper.TensorMap:
    """What ``cuTensorMapEncodeTiled`` makes of it, with its conditions."""
    element = meta["elem_size"]
    box, span = tuple(meta["block_size"]), _SPANS[meta["swizzle"]]
    row_bytes = descriptor.strides[0] * element
    if descriptor.base.data_ptr() % 16 or row_bytes % 16 or descriptor.strides[1] != 1:
        raise AssertionError("a tensor descriptor needs rows that begin on 16-byte boundaries")
    if min(descriptor.shape) < 1 or max(box) > 256 or (span > 16 and box[1] * element > span):
        raise AssertionError(f"no tensor descriptor has shape {descriptor.shape} and box {box}")
    return hopper.TensorMap(descriptor.base.data_ptr(), tuple(descriptor.shape), row_bytes, element, box, span)


class Driver:
    """What Triton asks of the driver of a device, for one compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability, self.launcher_cls = capability, Launcher
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 0, 0, 1024),
            unload_module=lambda _: None,
            get_device_properties=lambda _: {"max_shared_mem": LIMITS[capability].shared},
        )

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def set_current_device(self, device: int) -> None:
        assert device == self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def compute_capability(capability: int) -> Iterator[None]:
    """Kernels launched inside the ``with`` block run as on a device of this compute capability (80, 89, 90, 100)."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver(capability))
    try:
        with knobs.runtime.scope(), knobs.cache.scope():
            knobs.runtime.add_stages_inspection_hook = _without_machine_code
            knobs.cache.dir = f"{knobs.cache.dir}/ptx"  # where nobody looks for kernels with machine code
            yield
    finally:
        triton.runtime.driver._active = before


def _without_machine_code(*compilation: Any) -> tuple[str, str] | None:
    """Leaves ptxas out, a sixth of the time. Triton asks without arguments for a key of its caches."""
    if not compilation:
        return "ptx", "ptx"
    _, stages, *_ = compilation
    stages["cubin"] = lambda source, metadata: b""
    return None
