"""Rows of Parquet files, as data sets are on the Hub: tables whose images are bytes in a column."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from trainer.data.raw_json import Damage, Element

_ROWS = 64  # at a time: a row may hold several images


def table_rows(path: Path) -> Iterator[Element]:
    """The rows of a file as objects, in order; a column without a value is None, an image's content is bytes.

    A file that is damaged ends with :class:`Damage`.
    """
    number, size = 0, path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            total = table.metadata.num_rows
            for batch in table.iter_batches(_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield Element(f"row {number}", None, row, size * number // total)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = f"is not valid Parquet: {str(error).partition(chr(10))[0]}; nothing after it could be read"
        yield Element(f"row {number + 1}", None, Damage(reason))
