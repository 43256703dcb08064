"""A few lines of PTX, run as a kernel."""

import numpy as np
import torch
from launch_accesses import Accesses
from ptx_on_cpu.block import WARP, Block, Launch
from ptx_on_cpu.memory import GlobalMemory
from ptx_on_cpu.text import parse

__all__ = ["WARP", "run"]


def run(body: str, *tensors: torch.Tensor, threads: int = WARP, blocks: int = 1, shared: int = 0) -> None:
    """Run ``body`` with ``%rd0``, ``%rd1``, ... pointing at each thread's element of ``tensors``."""
    parameters = ",\n".join(f".param .u64 p{index}" for index in range(len(tensors)))
    lines = ["mov.u32 %r90, %tid.x;", "mov.u32 %r91, %ctaid.x;", f"mad.lo.u32 %r90, %r91, {threads}, %r90;"]
    for index, tensor in enumerate(tensors):
        lines.append(f"ld.param.b64 %rd{90 + index}, [p{index}];")
        lines.append(f"mad.wide.u32 %rd{index}, %r90, {tensor.element_size()}, %rd{90 + index};")
    source = f"""
.extern .shared .align 16 .b8 memory[];
.visible .entry test(
{parameters}
)
.reqntid {threads}
{{
.reg .pred %p<10>;
.reg .b16 %rs<10>;
.reg .b32 %r<99>;
.reg .b64 %rd<99>;
{chr(10).join(lines)}
{body}
ret;
}}
"""
    block = Block(parse(source), shared)
    accesses = Accesses("test", tensors)
    pointers = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.uint64).tobytes()
    launch = Launch(GlobalMemory(accesses), pointers, {}, (blocks, 1, 1))
    block.run_all(launch)
