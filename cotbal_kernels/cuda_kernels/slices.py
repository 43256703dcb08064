"""dW of the CUDA backend where a batch has several chunks: one product over all rows for each vocabulary slice.

A sum over chunks would need 4 V D bytes in float32 and move them twice a chunk. Instead the gradients of the logits of
every chunk wait until all chunks are through, and dW is taken slice by slice, each accumulated in float32 inside of its
product and rounded once. They wait where nothing is needed yet:

- in the memory of dW. The last slice is taken first, and what waits of the slices before it lies in front of the
  memory that its dW is written to. D rows have a place there, 2 D in float16, whose dW waits in float32;
- the last chunk in the workspace, where it was computed: half of its memory, the other half serves the slices.

The logits of the rows between them are computed again, slice by slice.
"""

# Shapes: N rows that may be computed, A of them computed again, C rows of a chunk, V vocabulary, W columns of a slice,
# S slices.

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# Columns of a slice: whole tiles of a product.
SLICE_MULTIPLE = 128
# Rows with a place in the memory of dW are a multiple of this where others come behind them.
STORED_MULTIPLE = 128


class Slices(NamedTuple):
    """How the vocabulary is cut; all slices but the last are ``width`` wide."""

    width: int
    vocab_size: int
    stored: int  # rows [0, stored) wait in the memory of dW
    held: int  # the last rows wait in the workspace

    @property
    def bounds(self) -> list[tuple[int, int]]:
        return [(first, min(first + self.width, self.vocab_size)) for first in range(0, self.vocab_size, self.width)]

    def again(self, rows: int) -> tuple[int, int]:
        """The rows of all ``rows`` whose logits are computed again."""
        return self.stored, rows - self.held

    def scratch(self, rows: int) -> tuple[int, int]:
        """Float32 elements of a slice: gradients of the logits of all rows, and the logits computed again.

        Where all are, the gradients lie at the front of each row of the logits.
        """
        start, stop = self.again(rows)
        gradients = 0 if stop - start == rows else math.ceil(rows * self.width / 2)
        return gradients, (stop - start) * self.width


@lru_cache(256)
def plan_slices(rows: int, vocab_size: int, chunk: int, stride: int, storage: int) -> Slices:
    """As few slices as the workspace of a chunk has room for, of one tile of columns at least.

    Args:
        rows: N, more than ``chunk``.
        chunk: rows of a chunk, the last one may have fewer.
        stride: float32 elements of a row of the workspace.
        storage: 16-bit elements of the memory of dW; 0 where nothing waits, since nothing has been computed yet.
    """
    last = (rows - 1) % chunk + 1
    for count in itertools.count(max(1, rows * vocab_size // (2 * chunk * stride))):  # no fewer have room
        width = -(-vocab_size // (count * SLICE_MULTIPLE)) * SLICE_MULTIPLE
        room = storage // (-(-vocab_size // width) * width)
        stored, held = rows, 0
        if room < rows:
            held = last if storage else 0
            stored = min(room // STORED_MULTIPLE * STORED_MULTIPLE or room, rows - held)
        plan = Slices(width, vocab_size, stored, held)
        free = (chunk - -(-held // 2)) * stride
        if sum(plan.scratch(rows)) <= free or width == SLICE_MULTIPLE:
            return plan
    raise AssertionError("unreachable: width falls to one tile")


class Waiting:
    """Gradients of logits, 16-bit, from their chunk to the product of their slice.

    Args:
        slices: the plan.
        rows: N.
        storage: the memory of dW as a vector of 16-bit elements.
        workspace_CV: of the logits of a chunk, float32 ``[C, stride]``.
    """

    def __init__(self, slices: Slices, rows: int, storage: Tensor, workspace_CV: Tensor) -> None:
        self.slices, self.rows, self.workspace_CV = slices, rows, workspace_CV
        self.bounds = slices.bounds
        shape = len(self.bounds), slices.stored, slices.width
        self.stored_SNW = storage[: math.prod(shape)].view(shape)
        # Two rows of 16-bit values in the memory of one in float32: those of the second half of the last chunk go
        # between those of the first half.
        self.half = -(-slices.held // 2)
        pairs = workspace_CV[: self.half].view(storage.dtype)
        self.held_H2V = pairs.view(self.half, 2, workspace_CV.shape[1])

    @property
    def free(self) -> Tensor:
        """The workspace that is free when all chunks are through, a vector in float32."""
        return self.workspace_CV[self.half :].view(-1)

    def place(self, start: int, rows: int) -> Tensor | None:
        """Where a chunk may be written at once: in dW's memory, if a row lies there in one piece; ``[C, V]``."""
        if len(self.bounds) > 1 or start + rows > self.slices.stored:
            return None
        return self.stored_SNW[0, start : start + rows, : self.slices.vocab_size]

    def take(self, dlogits_CV: Tensor, start: int) -> None:
        """Keep the chunk from row ``start`` on, as far as it has a place and is not there already."""
        slices, rows = self.slices, dlogits_CV.shape[0]
        if self.place(start, rows) is not None:
            return
        stored = min(rows, slices.stored - start)
        if stored > 0:
            whole = len(self.bounds) - 1
            first, stop = self.bounds[-1]
            to_SCW, kept_CV = self.stored_SNW[:, start : start + stored], dlogits_CV[:stored]
            if whole:
                to_SCW[:whole].copy_(kept_CV[:, :first].unflatten(1, (whole, slices.width)).transpose(0, 1))
            to_SCW[whole, :, : stop - first].copy_(kept_CV[:, first:])
        if slices.held and start + rows == self.rows:
            second_HV = dlogits_CV[self.half :]
            self.held_H2V[: rows - self.half, 1, : second_HV.shape[1]].copy_(second_HV)

    def fill(self, index: int, out_NW: Tensor) -> None:
        """The gradients of slice ``index``, of all rows but those whose logits are computed again."""
        (first, stop), held = self.bounds[index], self.slices.held
        out_NW[: self.slices.stored].copy_(self.stored_SNW[index, :, : stop - first])
        if held:
            out_HW = out_NW[self.rows - held :]
            out_HW[: self.half].copy_(self.held_H2V[:, 0, first:stop])
            out_HW[self.half :].copy_(self.held_H2V[: held - self.half, 1, first:stop])


def slice_buffers(slices: Slices, rows: int, free: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients ``[N, W]`` in ``dtype`` and logits ``[A, W]`` in float32, in ``free`` where it has the room.

    Where all rows are computed again the gradients are the front halves of the rows of the logits.
    """
    gradients, logits = slices.scratch(rows)
    if gradients + logits > free.numel():  # one tile of columns takes more than the workspace
        free = free.new_empty(gradients + logits)
    logits_AW = free[gradients : gradients + logits].view(-1, slices.width)
    if not gradients:
        return logits_AW.view(dtype)[:, : slices.width], logits_AW
    return free[:gradients].view(dtype)[: rows * slices.width].view(rows, slices.width), logits_AW
