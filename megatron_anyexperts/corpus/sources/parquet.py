"""Rows of Parquet files: only the columns that are needed, and each row for itself where one cannot be converted."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow.parquet import ParquetFile

from megatron_anyexperts.corpus.sample import Rejected

ROWS_AT_ONCE = 64


class Row(dict[str, Any]):
    """A record of which only the needed columns were read."""

    columns: tuple[str, ...] = ()
    """All columns of the file."""


def row_groups(path: Path) -> int:
    """Number of row groups; 0 for a damaged file."""
    try:
        with ParquetFile(path) as file:
            return file.num_row_groups
    except (OSError, ValueError, pyarrow.ArrowException):
        return 0


def rows(path: Path, group: int, needed: Collection[str] | None) -> Iterator[tuple[int, Row | Rejected]]:
    """Rows of a row group with their numbers in the file.

    Args:
        path: the file.
        group: number of the row group.
        needed: columns to read, of those that there are; None reads all.
    """
    position = 0
    try:
        with ParquetFile(path) as file:
            if group >= file.num_row_groups:
                return
            position = sum(file.metadata.row_group(earlier).num_rows for earlier in range(group))
            names = file.schema_arrow.names
            columns = [name for name in dict.fromkeys(names) if needed is None or name in needed]
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group], columns=columns):
                for row in _converted(batch):
                    if isinstance(row, Row):
                        row.columns = tuple(names)
                    yield position, row
                    position += 1
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        yield position, Rejected("damaged Parquet file", f"from row {position} of row group {group} on: {error}"[:200])


def _converted(batch: pyarrow.RecordBatch) -> list[Row | Rejected]:
    """The rows of a batch as Python values."""
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        numbers = _times_as_numbers(column.type)
        try:
            # A cast that changes nothing breaks some types, such as lists of lists of nulls (PyArrow 26).
            columns[name] = (column if numbers == column.type else column.cast(numbers)).to_pylist()
        except Exception:  # whatever a single value provokes: find the rows that do
            columns[name] = [_value(column, index, name) for index in range(len(column))]
    found = [Row((name, values[index]) for name, values in columns.items()) for index in range(batch.num_rows)]
    return [next((value for value in row.values() if isinstance(value, Rejected)), row) for row in found]


def _value(column: pyarrow.Array, index: int, name: str) -> Any:
    try:
        return column[index].as_py()
    except UnicodeDecodeError as error:
        return Rejected("text is not UTF-8", f"column {name}: {error}"[:200])
    except Exception as error:  # of many types, by the type of the column
        return Rejected("unreadable value", f"column {name}: {type(error).__name__}: {error}"[:200])


def _times_as_numbers(type_: pyarrow.DataType) -> pyarrow.DataType:
    """The type with its dates and times as integers, which hold what Python's cannot; itself where there are none.

    Python has no nanoseconds, no years beyond 9999, and not every time zone that a file may name.
    """
    if pyarrow.types.is_temporal(type_):
        return pyarrow.int32() if type_.bit_width == 32 else pyarrow.int64()
    if pyarrow.types.is_struct(type_):
        fields = (type_.field(index) for index in range(type_.num_fields))
        return pyarrow.struct([field.with_type(_times_as_numbers(field.type)) for field in fields])
    if pyarrow.types.is_list(type_) or pyarrow.types.is_large_list(type_):
        make = pyarrow.list_ if pyarrow.types.is_list(type_) else pyarrow.large_list
        return make(type_.value_field.with_type(_times_as_numbers(type_.value_type)))
    return type_
