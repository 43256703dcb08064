"""One linear head with its packed rows, and the launches of the kernels on it."""

# Shapes: M positions, N packed rows (the capacity), D hidden width, V vocabulary, T vocabulary tiles.

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..interface import LinearProblem, TokenLoss
from .compact import pack_kernel
from .configs import COMPILED, Tiles, blocks_for, can_use_tma, programs_for, tiles_for
from .dlogits import dlogits_kernel
from .grad_hidden import grad_hidden_kernel
from .grad_weight import grad_bias_kernel, grad_weight_kernel
from .project import WRITE_EXP, WRITE_GRADIENT, WRITE_NONE, WRITE_PACKED, project_kernel
from .row_losses import row_losses_kernel
from .row_scales import Scale
from .slices import Room, Slices, plan_slices, window_rows
from .tiles import Tile

# Everything beside inputs and outputs, packed rows and float32 sums included; logits get at least the second figure.
# At most a quarter goes to the tile statistics of rows whose loss alone is wanted.
WORKSPACE_BYTES, LEAST_LOGITS_BYTES = 512 * 2**20, 64 * 2**20
# Of one position: losses, hits, statistics, targets, tasks, index, factors, and copies of them on the way out.
POSITION_BYTES = 64


class RowResults(NamedTuple):
    """What the forward pass leaves of every position, 0 where one is not computed."""

    loss_M: Tensor
    hit_M: Tensor
    stats_2M: Tensor

    @classmethod
    def zeros(cls, like_M: Tensor) -> "RowResults":
        """In one memory, filled at once."""
        size = like_M.shape[0]
        floats = -(-3 * size // 4) * 4  # the hits begin at a 16-byte boundary, whatever M is
        memory = like_M.new_zeros(floats + 2 * size, dtype=torch.float32)
        float_3M = memory[: 3 * size].view(3, size)
        return cls(float_3M[0], memory[floats:].view(torch.int64), float_3M[1:])

    @classmethod
    def zeros_apart(cls, like_M: Tensor) -> "RowResults":
        """In memory of their own, as an op returns them."""
        stats_2M = like_M.new_zeros((2, *like_M.shape), dtype=torch.float32)
        return cls(torch.zeros_like(stats_2M[0]), torch.zeros_like(like_M), stats_2M)


class TileStatistics(NamedTuple):
    """Statistics of the vocabulary tiles of a window of rows."""

    max_TN: Tensor
    sum_TN: Tensor
    shift_TN: Tensor | None
    target_logit_N: Tensor
    target_first_N: Tensor

    @classmethod
    def empty(cls, tiles: int, rows: int, smoothing: bool, device: torch.device) -> "TileStatistics":
        def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        shift_TN = empty(tiles, rows) if smoothing else None
        return cls(empty(tiles, rows), empty(tiles, rows), shift_TN, empty(rows), empty(rows, dtype=torch.int32))


class KeptRows(NamedTuple):
    """Exponentials of a window of rows, and what turns them into gradients."""

    window: tuple[int, int]
    exp: Tensor  # [rows, :] of the whole vocabulary or [slices, rows, :]; int16 where they are packed
    max_TN: Tensor
    target_logit_N: Tensor


class Head:
    """One linear head with its packed rows: what every launch has in common."""

    def __init__(self, problem: LinearProblem, spec: TokenLoss, chunk_size: int) -> None:
        hidden_MD, weight_VD, bias_V, targets_M, rows_N, num_rows = problem
        self.weight_VD = weight_VD if weight_VD.stride(1) == 1 else weight_VD.contiguous()
        self.bias_V = None if bias_V is None else bias_V.contiguous()
        self.targets_M, self.rows_N, self.num_rows, self.spec = targets_M, rows_N, num_rows, spec
        self.capacity = rows_N.shape[0]
        self.vocab_size, self.width = weight_VD.shape
        self.tiles: Tiles = tiles_for(hidden_MD.device, hidden_MD.dtype)
        self.programs = programs_for(hidden_MD.device)
        self.use_tma = can_use_tma(self.weight_VD)
        self.smoothing = spec.smoothing > 0
        with on_device(hidden_MD):
            self.packed_ND = self._pack(hidden_MD)
        self.block = self.tiles.project.cols // self.tiles.project.parts  # columns with statistics of their own
        # Bytes of tile statistics of a row, and of those among them that wait beside its exponentials.
        whole = -(-self.vocab_size // self.block)
        self.statistics_bytes, self.kept_bytes = (12 if self.smoothing else 8) * whole, 4 * whole
        self.statistics_rows = max(1, WORKSPACE_BYTES // 4 // self.statistics_bytes)
        cols = self.tiles.project.cols
        self.padded = -(-self.vocab_size // cols) * cols  # a row of logits in whole tiles
        self.chunk_size = chunk_size
        self.quarters = 3 if hidden_MD.dtype == torch.bfloat16 else 4  # of an element that a waiting exponential takes

    @property
    def keeps_exponentials(self) -> bool:
        """With both a soft cap and smoothing the gradient is not a multiple of the exponential plus a constant."""
        return not (self.spec.softcap and self.smoothing)

    def elements(self, other_bytes: int) -> int:
        """Elements of workspace for logits, beside ``other_bytes`` that live at the same time."""
        itemsize = self.packed_ND.element_size()
        small = POSITION_BYTES * self.targets_M.shape[0] + 4 * self.vocab_size  # the gradient of a bias
        fixed = self.packed_ND.numel() * itemsize + small + other_bytes
        return self.chunk_size * self.padded or max(LEAST_LOGITS_BYTES, WORKSPACE_BYTES - fixed) // itemsize

    def wide_bytes(self, wanted: bool, dtype: torch.dtype) -> int:
        """What dX takes in float32 beyond its size in ``dtype``, in which it is returned."""
        return self.targets_M.shape[0] * self.width * (4 - dtype.itemsize) if wanted else 0

    def window_rows(self, other_bytes: int) -> int:
        """Rows whose logits fit the workspace, with the statistics that a ``chunk_size`` does not count."""
        statistics = 0 if self.chunk_size else self.statistics_bytes // self.packed_ND.element_size()
        limit = self.elements(other_bytes) // (self.padded + statistics)
        return window_rows(self.capacity, limit, self.width, self.tiles.grad_hidden, self.programs)

    def slices(self, other_bytes: int, storage: int | None) -> Slices:
        """``storage`` is elements of dW's memory; None where no exponentials are kept."""
        project = self.tiles.project
        statistics = 0 if self.chunk_size else self.kept_bytes // self.packed_ND.element_size()
        room = Room(self.elements(other_bytes), storage, self.quarters, statistics)
        align = math.lcm(project.rows, self.tiles.grad_weight.depth)
        return plan_slices(self.capacity, self.vocab_size, project.cols, room, align)

    def workspace(self, rows: int, stride: int) -> Tensor:
        return self.packed_ND.new_empty((rows, stride))

    def _pack(self, hidden_MD: Tensor) -> Tensor:
        hidden_MD = hidden_MD if hidden_MD.stride(1) == 1 else hidden_MD.contiguous()
        packed_ND = hidden_MD.new_empty((max(1, self.capacity), self.width))
        pack_kernel[(max(1, self.capacity),)](
            hidden_MD,
            self.rows_N,
            self.num_rows,
            packed_ND,
            self.capacity,
            self.width,
            hidden_MD.stride(0),
            PAD_ROWS=self.tiles.grad_weight.depth,
            BLOCK=blocks_for(hidden_MD.device).pack,
            **COMPILED,
        )
        return packed_ND

    def _hidden_argument(self, block: list[int]) -> "Tensor | TensorDescriptor":
        return TensorDescriptor.from_tensor(self.packed_ND, block) if self.use_tma else self.packed_ND

    def _weight_argument(self, block: list[int]) -> "Tensor | TensorDescriptor":
        return TensorDescriptor.from_tensor(self.weight_VD, block) if self.use_tma else self.weight_VD

    def _dlogits_argument(self, dlogits: Tensor, width: int, block: list[int]) -> "Tensor | TensorDescriptor":
        if not self.use_tma:
            return dlogits
        # Without rows nothing is read, but a descriptor needs an address.
        base = dlogits if dlogits.numel() else self.packed_ND
        return TensorDescriptor(base, [max(1, dlogits.shape[0]), width], [dlogits.stride(0), 1], block)

    def project(
        self,
        window: tuple[int, int],
        bounds: tuple[int, int],
        write: int,
        *,
        parts: TileStatistics | None = None,
        out: Tensor | None = None,
        stats_2M: Tensor | None = None,
        scale: Scale | None = None,
    ) -> None:
        """Launch the product of the rows ``[start, start + count)`` with the vocabulary in ``bounds``."""
        tile = self.tiles.project
        tiles = num_blocks(window[1], tile.rows) * num_blocks(bounds[1] - bounds[0], tile.cols)
        project_kernel[(min(self.programs, tiles),)](
            self._hidden_argument([tile.rows, tile.depth]),
            self._weight_argument([tile.cols, tile.depth]),
            self.bias_V,
            self.rows_N,
            self.num_rows,
            self.targets_M,
            *(parts or (None,) * 5),
            *((None, None) if stats_2M is None else stats_2M),
            *(scale or (None, None)),
            out,
            *window,
            *bounds,
            self.vocab_size,
            self.width,
            self.weight_VD.stride(0),
            0 if out is None else out.stride(-2),
            *self.spec,
            WRITE=write,
            HAS_BIAS=self.bias_V is not None,
            HAS_SCALE=self.spec.scale != 1,
            HAS_SOFTCAP=self.spec.softcap > 0,
            HAS_SMOOTHING=self.smoothing,
            USE_TMA=self.use_tma,
            BLOCK_M=tile.rows,
            BLOCK_V=tile.cols,
            BLOCK_D=tile.depth,
            PARTS=tile.parts,
            **_launch(tile),
        )

    def recompute(
        self, window: tuple[int, int], bounds: tuple[int, int], out: Tensor, stats_2M: Tensor, scale: Scale
    ) -> None:
        """The gradient of the logits of the rows in ``window``, from their statistics: 1F."""
        self.project(window, bounds, WRITE_GRADIENT.value, out=out, stats_2M=stats_2M, scale=scale)

    def row_losses(self, window: tuple[int, int], parts: TileStatistics, rows: RowResults) -> None:
        row_losses_kernel[(num_blocks(window[1], 32),)](
            *parts,
            self.rows_N,
            self.num_rows,
            self.targets_M,
            rows.loss_M,
            rows.hit_M,
            *rows.stats_2M,
            *window,
            self.vocab_size,
            self.spec.smoothing,
            self.spec.z_loss,
            self.spec.even,
            HAS_SMOOTHING=self.smoothing,
            BLOCK_V=self.block,
            BLOCK_T=32,
            BLOCK_M=32,
            **COMPILED,
        )

    def statistics(self, rows: int) -> TileStatistics:
        return TileStatistics.empty(
            num_blocks(self.vocab_size, self.block), rows, self.smoothing, self.packed_ND.device
        )

    def forward(self, window: tuple[int, int], rows: RowResults) -> None:
        """Losses of the rows in ``window`` and nothing else: 1F."""
        count = min(window[1], self.statistics_rows)
        parts = self.statistics(count)
        for start in range(window[0], window[0] + window[1], max(count, 1)):
            part = (start, min(count, window[0] + window[1] - start))
            # The statistics of a shorter last window lie at its own stride in the same memory.
            self.project(part, (0, self.vocab_size), WRITE_NONE.value, parts=parts)
            self.row_losses(part, parts, rows)

    def exponentials(self, window: tuple[int, int], out: Tensor, packed: bool, rows: RowResults) -> KeptRows:
        """Losses of the rows in ``window`` and their exponentials, ``[rows, :]`` or ``[slices, rows, :]``: 1F."""
        parts = self.statistics(window[1])
        write = WRITE_PACKED if packed else WRITE_EXP
        out = out.view(torch.int16) if packed else out
        self.project(window, (0, self.vocab_size), write.value, parts=parts, out=out)
        self.row_losses(window, parts, rows)
        return KeptRows(window, out, parts.max_TN, parts.target_logit_N)

    def dlogits(
        self, kept: KeptRows, index: int, bounds: tuple[int, int], out: Tensor, stats_2M: Tensor, scale: Scale
    ) -> None:
        """The gradient of the logits of kept rows in slice ``index``, which is ``bounds`` of the vocabulary."""
        packed = kept.exp.dtype == torch.int16
        first = bounds[0] // 4 * 3 if packed else bounds[0]
        exp = kept.exp[index] if kept.exp.dim() == 3 else kept.exp[:, first:]
        dlogits_kernel[(max(1, kept.window[1]),)](
            exp,
            kept.max_TN,
            kept.target_logit_N,
            self.rows_N,
            self.num_rows,
            self.targets_M,
            *stats_2M,
            *scale,
            out,
            *kept.window,
            *bounds,
            exp.stride(0),
            out.stride(0),
            self.spec.softcap,
            self.spec.smoothing,
            self.spec.z_loss,
            self.spec.even,
            PACKED=packed,
            HAS_SOFTCAP=self.spec.softcap > 0,
            HAS_SMOOTHING=self.spec.smoothing > 0,
            PAD_ROWS=self.tiles.grad_weight.depth,
            BLOCK_V=self.block,
            BLOCK_T=max(1, 2048 // self.block),
            **COMPILED,
        )

    def grad_hidden(
        self, window: tuple[int, int], bounds: tuple[int, int], dlogits: Tensor, scale: Scale, out_MD: Tensor
    ) -> None:
        tile = self.tiles.grad_hidden
        tiles = num_blocks(window[1], tile.rows) * num_blocks(self.width, tile.cols)
        grad_hidden_kernel[(min(self.programs, tiles),)](
            self._dlogits_argument(dlogits, bounds[1] - bounds[0], [tile.rows, tile.depth]),
            self._weight_argument([tile.depth, tile.cols]),
            self.rows_N,
            self.num_rows,
            scale.unit_2,
            out_MD,
            *window,
            *bounds,
            self.width,
            dlogits.stride(0),
            self.weight_VD.stride(0),
            USE_TMA=self.use_tma,
            BLOCK_M=tile.rows,
            BLOCK_D=tile.cols,
            BLOCK_V=tile.depth,
            PARTS=tile.parts,
            **_launch(tile),
        )

    def grad_weight(
        self, bounds: tuple[int, int], dlogits: Tensor, scale: Scale, out_VD: Tensor, accumulate: bool
    ) -> None:
        tile = self.tiles.grad_weight
        tiles = num_blocks(bounds[1] - bounds[0], tile.rows) * num_blocks(self.width, tile.cols)
        grad_weight_kernel[(min(self.programs, tiles),)](
            self._dlogits_argument(dlogits, bounds[1] - bounds[0], [tile.depth, tile.rows]),
            self._hidden_argument([tile.depth, tile.cols]),
            self.num_rows,
            scale.unit_2,
            out_VD,
            dlogits.shape[0],
            *bounds,
            self.width,
            dlogits.stride(0),
            ACCUMULATE=accumulate,
            USE_TMA=self.use_tma,
            BLOCK_V=tile.rows,
            BLOCK_D=tile.cols,
            BLOCK_M=tile.depth,
            **_launch(tile),
        )

    def grad_bias(
        self, window: tuple[int, int], bounds: tuple[int, int], dlogits: Tensor, scale: Scale, out_V: Tensor
    ) -> None:
        block = 64
        grad_bias_kernel[(num_blocks(bounds[1] - bounds[0], block),)](
            dlogits,
            self.num_rows,
            scale.unit_2,
            out_V,
            *window,
            *bounds,
            dlogits.stride(0),
            BLOCK_V=block,
            BLOCK_M=64,
            **COMPILED,
        )


def _launch(tile: Tile) -> dict[str, int]:
    return {"GROUP": tile.group, "num_warps": tile.warps, "num_stages": tile.stages, **COMPILED}


def num_blocks(size: int, block: int) -> int:
    return max(1, triton.cdiv(size, block))


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
