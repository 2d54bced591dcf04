"""Lines of a file with their places, none longer than a limit."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from megatron_anyexperts.corpus.sample import Rejected

Line = tuple[int, bytes | Rejected]
"""Offset of a line in the (unpacked) file and its bytes, or why they are not to be had."""


def parse(line: bytes | Rejected) -> dict[str, Any] | Rejected:
    """The record that a piece of JSON is."""
    if isinstance(line, Rejected):
        return line
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Rejected("damaged JSON", f"{type(error).__name__}: {error}"[:200])
    return record if isinstance(record, dict) else Rejected("JSON is not an object")


def read_line(file: BinaryIO, max_bytes: int) -> tuple[bytes | Rejected, int]:
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


def lines_from(file: BinaryIO, position: int, max_bytes: int) -> Iterator[Line]:
    """Lines from where the file stands, which has the offset `position`; empty ones are passed over."""
    while True:
        line, size = read_line(file, max_bytes)
        if not size:
            return
        if isinstance(line, Rejected) or line.strip():
            yield position, line
        position += size


def lines_of_range(file: BinaryIO, start: int, stop: int, max_bytes: int) -> Iterator[Line]:
    """Lines that begin in [start, stop)."""
    position = start
    if start > 0:
        file.seek(start - 1)
        position += read_line(file, max_bytes)[1] - 1
    while position < stop:
        line, size = read_line(file, max_bytes)
        if not size:
            return
        if isinstance(line, Rejected) or line.strip():
            yield position, line
        position += size
