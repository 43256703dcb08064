"""Rows of Parquet files, as data sets are on the Hub: tables whose images are bytes in a column."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from trainer.data.raw_json import Damage, Element

_ROWS = 64  # at a time: a row may hold several images
# Texts that are not UTF-8, dates beyond Python's, kinds of columns that it has nothing for.
_UNREADABLE = (pyarrow.ArrowException, ValueError, OverflowError)


def table_rows(path: Path) -> Iterator[Element]:
    """The rows of a file as objects, in order; a column without a value is None, an image's content is bytes.

    A file that is damaged ends with :class:`Damage`. A row with a value that cannot be read, such as a text that is not
    UTF-8, is one itself, and the rows behind it follow.
    """
    number, size = 0, path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            total = table.metadata.num_rows
            for batch in table.iter_batches(_ROWS):
                for row in _rows(batch):
                    number += 1
                    yield Element(f"row {number}", None, row, size * number // total)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = f"is not valid Parquet: {_first_line(error)}; nothing after it could be read"
        yield Element(f"row {number + 1}", None, Damage(reason))


def _rows(batch: pyarrow.RecordBatch) -> list[Any]:
    try:
        return batch.to_pylist()
    except _UNREADABLE:
        return [_row(batch, index) for index in range(batch.num_rows)]


def _row(batch: pyarrow.RecordBatch, index: int) -> Any:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except _UNREADABLE as error:
            return Damage(f"column '{name}' has no readable value: {_first_line(error)}", ends=False)
    return row


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
