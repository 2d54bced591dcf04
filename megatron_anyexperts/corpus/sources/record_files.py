"""Files of records: JSON lines or one JSON array, Parquet, CSV; read as streams, never whole in memory."""

from collections.abc import Collection, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from megatron_anyexperts.corpus.sample import Rejected
from megatron_anyexperts.corpus.sources import compressed
from megatron_anyexperts.corpus.sources.base import Chunk
from megatron_anyexperts.corpus.sources.json_array import elements, skip_space
from megatron_anyexperts.corpus.sources.lines import Line, lines_from, lines_of_range, parse, read_line
from megatron_anyexperts.corpus.sources.tables import Quotes, table_rows

Record = tuple[int, dict[str, Any] | Rejected]
"""Position in the file and the record, or why there is none; -1 for what is wrong with the file."""

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (".csv", ".tsv")
FORMS = f"{', '.join(JSON_SUFFIXES + TABLE_SUFFIXES)}, each also with {', '.join(compressed.SUFFIXES)}, and .parquet"
"""What can be read, for messages."""


def form_of(name: str) -> str | None:
    """The suffix that says how a file is read, compression aside and in small letters; None for other files."""
    name = name.lower()
    for suffix in compressed.SUFFIXES:
        if name.endswith(suffix):
            name = name.removesuffix(suffix)
            break
    else:
        if name.endswith(".parquet"):
            return ".parquet"
    return next((suffix for suffix in JSON_SUFFIXES + TABLE_SUFFIXES if name.endswith(suffix)), None)


def record_chunks(path: Path, name: str, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut a file into units of work: byte ranges of JSON, row groups of Parquet, other files whole."""
    form = form_of(name)
    if form == ".parquet":
        from megatron_anyexperts.corpus.sources.parquet import row_groups

        # A damaged file has no row groups that could be listed; reading it will say what is wrong.
        for group in range(max(1, row_groups(path))):
            yield {"file": name, "group": group}
    elif form in JSON_SUFFIXES and not name.lower().endswith(compressed.SUFFIXES):
        yield from _json_chunks(path, name, chunk_bytes)
    else:
        yield {"file": name}


def _json_chunks(path: Path, name: str, chunk_bytes: int) -> Iterator[Chunk]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        layout, start = _layout(file, form_of(name))
        if layout == "array":
            # Only the borders are of interest: nothing is kept.
            border = start
            for position, _ in elements(file, start, 0):
                if border - start >= chunk_bytes:
                    yield {"file": name, "elements": [start, border]}
                    start = border
                border = position
            # As far as the file reaches and beyond: what is wrong with its end as well.
            yield {"file": name, "elements": [start, size + 1]}
        elif layout == "document":
            yield {"file": name, "document": True}
        else:
            for start in range(0, size, chunk_bytes):
                yield {"file": name, "start": start, "stop": start + chunk_bytes}


def _layout(file: BufferedReader, form: str | None) -> tuple[str, int]:
    """How records lie in a JSON file, and where reading has to begin: the file stands there."""
    position = skip_space(file)
    start = file.peek(1)[:100]
    if form == ".json" and start.startswith(b"["):
        return "array", position + len(file.read(1))
    # An opening brace alone in the first line: one object over several lines.
    if form == ".json" and start.partition(b"\n")[0].strip() == b"{" and b"\n" in start:
        return "document", position
    return "lines", position


def read_records(
    path: Path,
    chunk: Chunk,
    wanted: Collection[int] | None,
    max_bytes: int,
    columns: Collection[str] | None = None,
    quotes: Quotes = "auto",
) -> Iterator[Record]:
    """Records of a chunk.

    Args:
        path: the file.
        chunk: one of `record_chunks`.
        wanted: positions to hand over; None means all.
        max_bytes: longest line, element or row.
        columns: what is needed of a Parquet file; None reads all.
        quotes: what a double quote in a table means.
    """
    last = -1
    try:
        for last, record in _records(path, chunk, wanted, max_bytes, columns, quotes):
            if wanted is None or last in wanted:
                yield last, record
    except Rejected as rejected:
        yield -1, rejected
    except compressed.DAMAGE as error:
        reason = "damaged compressed file" if path.name.lower().endswith(compressed.SUFFIXES) else "unreadable file"
        place = f"after record {last}: " if last >= 0 else ""
        yield -1, Rejected(reason, f"{place}{type(error).__name__}: {error}"[:200])


def _records(
    path: Path,
    chunk: Chunk,
    wanted: Collection[int] | None,
    max_bytes: int,
    columns: Collection[str] | None,
    quotes: Quotes,
) -> Iterator[Record]:
    form = form_of(chunk["file"])
    if "group" in chunk:
        from megatron_anyexperts.corpus.sources.parquet import rows

        yield from rows(path, chunk["group"], columns)
        return
    if "document" in chunk:
        raise _document()
    with compressed.open_unpacked(path) as file:
        if form in TABLE_SUFFIXES:
            quotes = "csv" if form == ".csv" and quotes == "auto" else quotes
            yield from enumerate(table_rows(file, "\t" if form == ".tsv" else ",", quotes, max_bytes))
            return
        if wanted is not None and ("start" in chunk or "elements" in chunk):
            lines = _at(file, "elements" in chunk, sorted(wanted), max_bytes)
        elif "start" in chunk:
            lines = lines_of_range(file, chunk["start"], chunk["stop"], max_bytes)
        elif "elements" in chunk:
            lines = _elements_of_range(file, *chunk["elements"], max_bytes)
        else:
            layout, position = _layout(file, form)
            if layout == "document":
                raise _document()
            lines = (elements if layout == "array" else lines_from)(file, position, max_bytes)
        for position, line in lines:
            yield position, parse(line)


def _document() -> Rejected:
    return Rejected("one JSON object", "a JSON file of records holds an array of them, or one in each line")


def _elements_of_range(file: BufferedReader, start: int, stop: int, max_bytes: int) -> Iterator[Line]:
    file.seek(start)
    for position, element in elements(file, start, max_bytes):
        if position >= stop:
            return
        yield position, element


def _at(file: BufferedReader, array: bool, positions: list[int], max_bytes: int) -> Iterator[Line]:
    for position in positions:
        file.seek(position)
        if not array:
            yield position, read_line(file, max_bytes)[0]
        elif (found := next(elements(file, position, max_bytes), None)) is not None:
            yield found
