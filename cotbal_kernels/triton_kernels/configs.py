"""Tile shapes by what the device can hold. Chosen from the accumulator and shared-memory budget; see docs/kernels.md
for which of them were measured.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .tiles import Tile


class Tiles(NamedTuple):
    """The three products of one training step."""

    project: Tile  # [rows, vocabulary] over the hidden width
    grad_hidden: Tile  # [rows, hidden width] over the vocabulary
    grad_weight: Tile  # [vocabulary, hidden width] over the rows


# 16-bit products on 128 x 256 tiles: 128 accumulators a thread, 144 KiB of operands in flight.
LARGE = Tiles(*(Tile(128, 256, 64, warps=8, stages=3, parts=2),) * 3)
# Devices with 99 KiB of shared memory a block (sm_86, sm_89, sm_120).
SMALL = Tiles(*(Tile(128, 128, 32, warps=8, stages=4),) * 3)
# float32 without tensor cores, as PyTorch multiplies by default: bound by the multiply-adds, not by the tiles.
# Steps of 32 would spill in the loops of project (Triton 3.6) and grad_hidden (3.9) from sm_90 on, where operands come
# through descriptors and go through registers, and in that of grad_weight on sm_80 (3.9).
SINGLE = Tiles(*(Tile(64, 64, 16, warps=4, stages=3),) * 3)
# The interpreter on a CPU: small, and no two sides alike.
INTERPRETED = Tiles(Tile(16, 64, 32, 1, 1, 2, 2), Tile(16, 64, 32, 1, 1, 2, 2), Tile(32, 64, 16, 1, 1, 2))


class Blocks(NamedTuple):
    """Elements that one program of the other kernels takes at a time."""

    compact: int
    pack: int
    row_scales: int
    task_sums: int
    scale: int
    logits: int  # at most


GPU_BLOCKS = Blocks(compact=4096, pack=1024, row_scales=2048, task_sums=1024, scale=4096, logits=4096)
INTERPRETED_BLOCKS = Blocks(compact=32, pack=64, row_scales=16, task_sums=16, scale=256, logits=32)


# Of every launch. A product and the sum it goes into are one instruction: Triton's default up to 3.9, not from 3.10 on,
# and half of the time of a float32 product.
COMPILED = {"enable_fp_fusion": True}


class DeviceLimits(NamedTuple):
    """What decides how kernels are launched on a GPU."""

    capability: int  # 80, 90, ...
    shared: int  # bytes of shared memory that one block can have
    multiprocessors: int


@cache
def limits_of(device: torch.device) -> DeviceLimits | None:
    """The limits of a GPU; None on a CPU, where kernels run in Triton's interpreter."""
    if device.type == "cpu":
        return None
    found = torch.cuda.get_device_properties(device)
    shared = int(found.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    return DeviceLimits(10 * found.major + found.minor, shared, found.multi_processor_count)


def tiles_for(device: torch.device, dtype: torch.dtype) -> Tiles:
    """The tile shapes for products in ``dtype`` on ``device``."""
    limits = limits_of(device)
    if limits is None:
        return INTERPRETED
    if dtype == torch.float32:
        return SINGLE
    return LARGE if limits.shared >= 160_000 else SMALL


def blocks_for(device: torch.device) -> Blocks:
    """Block sizes on ``device``; those of the interpreter are such that every tensor of a test takes several."""
    return INTERPRETED_BLOCKS if limits_of(device) is None else GPU_BLOCKS


def can_use_tma(weight_VD: Tensor) -> bool:
    """Tensor memory access needs sm_90 and rows that begin on 16-byte boundaries, those of packed rows too."""
    limits = limits_of(weight_VD.device)
    if limits is None or limits.capability < 90:
        return False
    row = weight_VD.stride(0) * weight_VD.element_size()
    packed = weight_VD.shape[1] * weight_VD.element_size()
    # Rows that overlap (a weight expanded from one row) have no descriptor.
    return row % 16 == 0 and packed % 16 == 0 and row >= packed and weight_VD.data_ptr() % 16 == 0


def programs_for(device: torch.device) -> int:
    """Persistent programs of one launch: one per multiprocessor; three in the interpreter."""
    limits = limits_of(device)
    return 3 if limits is None else limits.multiprocessors
