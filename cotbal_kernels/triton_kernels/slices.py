"""How the vocabulary, or the rows under a frozen head, are cut so that a part of the logits fits the workspace."""

# Shapes: V vocabulary.

from typing import NamedTuple

from .tiles import Tile

# What a slice costs beside its products: dX is read and written once more, 8 bytes an element, in the time of so many
# flop a byte (H100 236, H200 165, A100 156 in 16 bits).
FLOP_PER_BYTE = 200
MORE_SLICES = 32  # numbers that are looked at from the fewest on; the best is about sqrt(V / 800), 13 at V = 128256


class Slices(NamedTuple):
    """How the vocabulary is cut for the second pass; all slices but the first are ``stride`` wide.

    Exponentials are kept of the packed rows [0, stored_rows) in the memory of dW, their last slice in the workspace,
    and of the ``held_rows`` behind them in the workspace. The rows behind those are computed again.
    """

    bounds: tuple[int, ...]  # 0, ..., V
    stride: int  # elements between rows of a slice
    stored_rows: int
    held_rows: int

    def ranges(self) -> list[tuple[int, int]]:
        return list(zip(self.bounds, self.bounds[1:], strict=False))

    def first_tile(self, start: int, block: int) -> int:
        """Index of the vocabulary tile that begins at ``start``, the bound of a slice."""
        return 0 if start == 0 else -(-self.bounds[1] // block) + (start - self.bounds[1]) // block

    def num_tiles(self, block: int) -> int:
        return self.first_tile(self.bounds[-1], block) if len(self.bounds) > 2 else -(-self.bounds[1] // block)

    @property
    def held_starts(self) -> list[int]:
        """Row of the workspace at which a slice of the held rows begins; they end where the first one does.

        The last slice comes first, so behind each lies memory that is used up: room for the rows computed again.
        """
        return [self.held_rows * later for later in reversed(range(len(self.bounds) - 1))]


def plan_slices(
    rows: int, vocab_size: int, cols: int, elements: int, storage_rows: int | None, statistics: int, align: int
) -> Slices:
    """Cut the vocabulary so that the logits fit ``elements`` of workspace, one tile at least.

    Args:
        cols: rows of a slice are padded to whole tiles of so many columns.
        storage_rows: how many rows may wait in the memory of dW; None where no exponentials are kept.
        statistics: elements that a row whose exponentials are kept takes besides.
        align: held rows are a multiple of this where others come behind them.
    """
    keeps = storage_rows is not None
    padded = -(-vocab_size // cols) * cols
    if rows * (padded + statistics * keeps) <= elements:
        return Slices((0, vocab_size), padded, 0, rows if keeps else 0)
    stored = min(rows, storage_rows or 0)
    left = elements - stored * statistics
    fewest = -(-vocab_size // max(cols, left // rows // cols * cols))

    def cut(count: int) -> tuple[int, int]:
        """Columns of a slice, and how many rows are held: one slice of every row fits, and the others of those."""
        width = -(-vocab_size // (count * cols)) * cols
        more = -(-vocab_size // width) - 1
        held = max(0, left - rows * width) // max(1, more * width + statistics) if keeps else 0
        return width, rows - stored if held >= rows - stored else held // align * align

    def cost(chosen: tuple[int, int]) -> int:
        """Flop / D, without what every cut costs."""
        width, held = chosen
        return 2 * vocab_size * (rows - stored - held) + 8 * FLOP_PER_BYTE * rows * -(-vocab_size // width)

    some_left = keeps and stored < rows
    width, held = min(map(cut, range(fewest, fewest + (MORE_SLICES if some_left else 1))), key=cost)
    bounds = (0, *reversed(range(vocab_size, 0, -width)))
    return Slices(bounds, width, stored, held)


def window_rows(capacity: int, limit: int, width: int, tile: Tile, programs: int) -> int:
    """Rows of a window, at most ``limit``: whole tiles, as few rounds of the programs in dX as any such number has.

    ``tile`` is that of dX. Its tiles run along the whole vocabulary, 31 times as long as those of the logits at
    V = 128256, D = 4096, and a window has few of them: a round that is half empty is what a window costs.
    """
    if limit < tile.rows:
        return max(1, min(capacity, limit))

    def rounds(rows: int) -> int:
        return -(-(-(-rows // tile.rows) * -(-width // tile.cols)) // programs)

    def all_rounds(rows: int) -> int:
        return capacity // rows * rounds(rows) + rounds(capacity % rows)

    choices = range(tile.rows, limit + 1, tile.rows)
    return max(1, min(capacity, min(choices, key=lambda rows: (all_rounds(rows), -rows))))
