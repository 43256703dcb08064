"""How the vocabulary, or the rows under a frozen head, are cut so that a part of the logits fits the workspace."""

# Shapes: V vocabulary.

from typing import NamedTuple

from .tiles import Tile

# What a slice costs beside its products: dX is read and written once more, 8 bytes an element, in the time of so many
# flop a byte (H100 236, H200 165, A100 156 in 16 bits).
FLOP_PER_BYTE = 200
# Numbers that are looked at from the fewest on; the best is about sqrt(V / 600) in bfloat16, 15 at V = 128256.
MORE_SLICES = 32


class Slices(NamedTuple):
    """How the vocabulary is cut for the second pass; all slices but the last are ``stride`` wide.

    Exponentials are kept of the packed rows [0, stored_rows) in the memory of dW, and of the ``held_rows`` behind them
    in the workspace. The rows behind those are computed again.
    """

    bounds: tuple[int, ...]  # 0, ..., V
    stride: int  # elements between rows of a slice
    stored_rows: int
    held_rows: int
    in_place: bool = False  # one slice of the workspace takes the exponentials of every row, and their gradients

    def ranges(self) -> list[tuple[int, int]]:
        return list(zip(self.bounds, self.bounds[1:], strict=False))


class Room(NamedTuple):
    """Elements that there are for logits, in the dtype of the products."""

    workspace: int
    storage: int | None  # memory of dW, where exponentials may wait; None where none are kept
    quarters: int  # of an element that an exponential takes where it waits, 3 or 4
    statistics: int  # that a row whose exponentials are kept takes besides


def plan_slices(rows: int, vocab_size: int, cols: int, room: Room, align: int) -> Slices:
    """Cut the vocabulary so that the logits fit the workspace, one tile at least.

    Args:
        cols: rows of a slice are padded to whole tiles of so many columns.
        align: stored and held rows are multiples of this where others come behind them.
    """
    workspace, storage, quarters, statistics = room
    keeps = storage is not None
    padded = -(-vocab_size // cols) * cols
    if rows * (padded + statistics * keeps) <= workspace:
        return Slices((0, vocab_size), padded, 0, rows if keeps else 0, in_place=keeps)

    def fitting(elements: int | None, columns: int, besides: int, wanted: int) -> int:
        found = max(0, elements or 0) // (columns * quarters // 4 + besides)
        return wanted if found >= wanted else found // align * align

    def cut(count: int) -> Slices:
        """One slice of every row in the workspace, and as many rows as fit beside it."""
        width = -(-vocab_size // (count * cols)) * cols
        bounds = (*range(0, vocab_size, width), vocab_size)
        left = workspace - rows * width if keeps else 0
        stored = fitting(storage, (len(bounds) - 1) * width, 0, rows)
        if stored * statistics > max(0, left):
            stored = fitting(left, 0, statistics, rows)
        return Slices(bounds, width, stored, fitting(left - stored * statistics, padded, statistics, rows - stored))

    def cost(plan: Slices) -> int:
        """Flop / D, without what every cut costs."""
        again = rows - plan.stored_rows - plan.held_rows
        return 2 * vocab_size * again + 8 * FLOP_PER_BYTE * rows * len(plan.ranges())

    # Where memory is scarce, statistics of stored rows would make slices narrow, and cost more than their products.
    fewest = -(-vocab_size // max(cols, workspace // rows // cols * cols))
    return min(map(cut, range(fewest, fewest + (MORE_SLICES if keeps else 1))), key=cost)


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

    whole = -(-capacity // tile.rows) * tile.rows  # no window needs more, whatever a chunk_size allows
    choices = range(tile.rows, max(tile.rows, min(limit, whole)) + 1, tile.rows)
    return max(1, min(capacity, min(choices, key=lambda rows: (all_rounds(rows), -rows))))
