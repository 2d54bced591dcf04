"""Files of records: JSON lines (plain or compressed), Parquet, CSV. Read as streams, never whole in memory."""

import csv
import gzip
import io
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_anyexperts.data.build.sample import Rejected
from megatron_anyexperts.data.build.sources.base import Chunk

Record = tuple[int, dict[str, Any] | Rejected]
"""Position in the file and the record, or why there is none."""

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".parquet", ".csv", ".tsv")

MAX_EXPANSION = 200
"""How many times its size a compressed file may unfold to, beyond a first 64 MiB."""


def record_chunks(path: Path, name: str, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut a file into units of work: byte ranges of JSON lines, row groups of Parquet, other files whole."""
    if name.endswith((".jsonl", ".ndjson")):
        for start in range(0, path.stat().st_size, chunk_bytes):
            yield {"file": name, "start": start, "stop": start + chunk_bytes}
    elif name.endswith(".parquet"):
        # A damaged file has no row groups that could be listed; reading it will say what is wrong.
        for group in range(max(1, _row_groups(path))):
            yield {"file": name, "group": group}
    else:
        yield {"file": name}


def read_records(path: Path, chunk: Chunk, wanted: Collection[int] | None, max_bytes: int) -> Iterator[Record]:
    """Records of a chunk.

    Args:
        path: the file.
        chunk: one of `record_chunks`.
        wanted: positions to hand over; None means all.
        max_bytes: longest line of a line-based file.
    """
    try:
        if "start" in chunk:
            with open(path, "rb") as file:
                if wanted is None:
                    lines = _lines_of_range(file, chunk["start"], chunk["stop"], max_bytes)
                else:
                    lines = _lines_at(file, sorted(wanted), max_bytes)
                for position, line in lines:
                    yield position, _parse(line)
            return
        if "group" in chunk:
            records = _parquet_records(path, chunk["group"])
        elif path.name.endswith((".csv", ".tsv")):
            records = _csv_records(path)
        else:
            records = ((position, _parse(line)) for position, line in _compressed_lines(path, max_bytes))
        for position, record in records:
            if wanted is None or position in wanted:
                yield position, record
    except OSError as error:
        # Positions of records are never negative, so this one cannot be mistaken for one of them.
        yield -1, Rejected("unreadable file", str(error)[:200])


def _parse(line: bytes | Rejected) -> dict[str, Any] | Rejected:
    if isinstance(line, Rejected):
        return line
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Rejected("damaged JSON", f"{type(error).__name__}: {error}"[:200])
    return record if isinstance(record, dict) else Rejected("JSON is not an object")


def _line(file: BinaryIO, max_bytes: int) -> tuple[bytes | Rejected, int]:
    """The next line and the bytes it takes; a line that is too long is passed over in pieces."""
    line = file.readline(max_bytes + 1)
    size = len(line)
    if size <= max_bytes:
        return line, size
    piece = line
    while piece and not piece.endswith(b"\n"):
        piece = file.readline(2**20)
        size += len(piece)
    return Rejected("too many bytes", f"a line of {size} bytes, limit {max_bytes}"), size


def _lines_of_range(file: BinaryIO, start: int, stop: int, max_bytes: int) -> Iterator[tuple[int, bytes | Rejected]]:
    """Lines that begin in [start, stop), each with its offset."""
    position = start
    if start > 0:
        file.seek(start - 1)
        position += _line(file, max_bytes)[1] - 1
    while position < stop:
        line, size = _line(file, max_bytes)
        if not size:
            return
        if isinstance(line, Rejected) or line.strip():
            yield position, line
        position += size


def _lines_at(file: BinaryIO, positions: list[int], max_bytes: int) -> Iterator[tuple[int, bytes | Rejected]]:
    for position in positions:
        file.seek(position)
        yield position, _line(file, max_bytes)[0]


def _compressed_lines(path: Path, max_bytes: int) -> Iterator[tuple[int, bytes | Rejected]]:
    most = MAX_EXPANSION * path.stat().st_size + 64 * 2**20
    with _open_compressed(path) as file:
        position = 0
        while True:
            try:
                line, size = _line(file, max_bytes)
            except (OSError, EOFError, ValueError) as error:
                yield position, Rejected("damaged compressed file", f"{type(error).__name__}: {error}"[:200])
                return
            if not size:
                return
            if position + size > most:
                yield position, Rejected("decompression bomb", f"more than {most} bytes from {path.stat().st_size}")
                return
            if isinstance(line, Rejected) or line.strip():
                yield position, line
            position += size


def _open_compressed(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path)
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(os.fspath(path), compression="zstd"), 2**20)


def _row_groups(path: Path) -> int:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            return file.num_row_groups
    except (OSError, pyarrow.ArrowException):
        return 0


def _parquet_records(path: Path, group: int) -> Iterator[Record]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    position = 0
    try:
        with ParquetFile(path) as file:
            if group >= file.num_row_groups:
                return
            position = sum(file.metadata.row_group(earlier).num_rows for earlier in range(group))
            for batch in file.iter_batches(batch_size=64, row_groups=[group]):
                for record in batch.to_pylist():
                    yield position, record
                    position += 1
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        yield position, Rejected("damaged Parquet file", str(error)[:200])


def _csv_records(path: Path) -> Iterator[Record]:
    position = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for record in csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","):
                yield position, record
                position += 1
    except (csv.Error, UnicodeDecodeError) as error:
        yield position, Rejected("damaged table", str(error)[:200])
