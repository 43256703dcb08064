"""How the vocabulary, or the rows under a frozen head, are cut so that a part of the logits fits the workspace."""

# Shapes: V vocabulary.

from typing import NamedTuple

from .tiles import Tile


class Slices(NamedTuple):
    """How the vocabulary is cut for the second pass; all slices but the first are ``stride`` wide."""

    bounds: tuple[int, ...]  # 0, ..., V
    stride: int  # elements between rows of a slice
    kept_rows: int  # packed rows [0, kept_rows) keep their exponentials

    def ranges(self) -> list[tuple[int, int]]:
        return list(zip(self.bounds, self.bounds[1:], strict=False))

    def first_tile(self, start: int, block: int) -> int:
        """Index of the vocabulary tile that begins at ``start``, the bound of a slice."""
        return 0 if start == 0 else -(-self.bounds[1] // block) + (start - self.bounds[1]) // block

    def num_tiles(self, block: int) -> int:
        return self.first_tile(self.bounds[-1], block) if len(self.bounds) > 2 else -(-self.bounds[1] // block)


def plan_slices(rows: int, vocab_size: int, block: int, elements: int, storage_rows: int) -> Slices:
    """Cut the vocabulary so that one slice of ``rows`` rows fits ``elements`` of workspace, one tile at least.

    Rows of a slice are padded to whole tiles of ``block`` columns. ``storage_rows`` is how many rows may wait in
    the memory of dW.
    """
    padded = -(-vocab_size // block) * block
    if rows * padded <= elements:
        return Slices((0, vocab_size), padded, rows)
    width = max(block, elements // max(rows, 1) // block * block)
    count = -(-vocab_size // width)
    bounds = (0, *(vocab_size - left * width for left in reversed(range(count))))
    return Slices(bounds, width, min(rows, storage_rows))


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
