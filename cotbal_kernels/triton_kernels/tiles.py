"""How matrix products are cut into tiles, and which tile a persistent program computes next."""

from typing import NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """Shape of one product tile and how it is computed."""

    rows: int  # of the output
    cols: int  # of the output
    depth: int  # of one step along the summed dimension
    warps: int
    stages: int  # depth steps in flight
    group: int = 8  # row blocks that share a column block while it is in the second-level cache
    parts: int = 1  # column parts, 1 or 2, that the epilogue takes one after the other to save registers


@triton.jit
def tile_at(index, num_row_blocks, num_col_blocks, GROUP: tl.constexpr):
    """Row and column block of the tile ``index``: ``GROUP`` row blocks go down together, column by column."""
    per_group = GROUP * num_col_blocks
    first = (index // per_group) * GROUP
    size = tl.minimum(num_row_blocks - first, GROUP)
    within = index % per_group
    return first + within % size, within // size


@triton.jit
def rows_here(num_rows_ptr, row_start, row_count):
    """How many of the packed rows [row_start, row_start + row_count) exist."""
    return tl.minimum(tl.maximum(tl.load(num_rows_ptr) - row_start, 0), row_count).to(tl.int32)


@triton.jit
def left_half(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left half of the columns of a product tile; a thread holds neighbouring columns, so nothing moves."""
    left, _ = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))
    return left


@triton.jit
def right_half(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The other half."""
    _, right = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))
    return right


@triton.jit
def parts_of(tile, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr):
    """The column parts of a product tile, which an epilogue takes one after the other: all of it, or its two halves."""
    return (tile,) if PARTS == 1 else (left_half(tile, ROWS, COLS), right_half(tile, ROWS, COLS))
