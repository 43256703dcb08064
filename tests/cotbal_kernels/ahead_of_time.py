"""Compiles Triton kernels for GPUs that are not there, and says what they would need.

signature = {"x_ptr": "*fp32", "n": "i32"}
resources = compile_for(kernel, signature, {"BLOCK": 128}, capability=90)
assert resources.spills == 0
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)  # A100, H100/H200, B200


@dataclass(frozen=True)
class Resources:
    """What one program (CTA) of a compiled kernel takes."""

    registers: int  # per thread
    spills: int  # bytes per thread stored to local memory because registers ran out
    stack: int  # bytes per thread of local memory, spills included
    shared: int  # bytes of shared memory per program


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    capability: int = 90,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Resources:
    """Compile ``kernel`` down to machine code for sm_``capability``; a kernel that does not compile raises.

    ``signature`` gives the type of every run-time argument ("*fp32", "*i64", "i32", ...), ``constexprs`` the value of
    every other one. Pointers are taken as aligned to 16 bytes, as torch's are when it launches the kernel; pass
    ``constexprs={"x_ptr": None}`` for a pointer that is None.
    """
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    unknown = (signature.keys() | constexprs.keys()) - types.keys()
    missing = {name for name, kind in types.items() if kind == "constexpr"} - constexprs.keys()
    if unknown or missing:
        raise ValueError(
            f"arguments of {kernel.__name__}: unknown {sorted(unknown)}, without a value {sorted(missing)}"
        )
    aligned = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(types.values()) if kind.startswith("*")}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=types, constexprs=dict(constexprs), attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    report = _assemble(compiled.asm["ptx"], capability)
    return Resources(
        registers=_number(r"Used (\d+) registers", report),
        spills=_number(r"(\d+) bytes spill stores", report) + _number(r"(\d+) bytes spill loads", report),
        stack=_number(r"(\d+) bytes stack frame", report),
        shared=compiled.metadata.shared,
    )


def _assemble(ptx: str, capability: int) -> str:
    """What ``ptxas -v`` says: Triton runs the same assembler but keeps its report to itself."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}"]
        command += [str(source), "-o", str(source.with_suffix(".cubin"))]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def _number(pattern: str, report: str) -> int:
    found = re.findall(pattern, report)
    if len(found) != 1:
        raise RuntimeError(f"expected one {pattern!r} in the report of ptxas, found {len(found)}:\n{report}")
    return int(found[0])
