"""CSV and TSV files: one bad row costs itself, and no row swallows another."""

import csv
import io
from collections import deque
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal

from megatron_anyexperts.corpus.sample import Rejected

Quotes = Literal["csv", "text", "auto"]

MAX_REREAD = 8
"""How many times its size a file may be read again behind quotes that do not close, beyond a first 64 MiB."""


def table_rows(file: BinaryIO, separator: str, quotes: Quotes, max_bytes: int) -> Iterator[dict[str, Any] | Rejected]:
    """Records of a table whose first row names the fields.

    Args:
        file: UTF-8.
        separator: of fields.
        quotes: what a double quote means. `csv`: a field that begins with one ends with the next that is not doubled,
            over several lines if need be. `text`: nothing, a line is a row. `auto`: nothing, but where a field can
            only have been quoted, as it holds doubled quotes or separators between quotes or spans lines that are no
            rows by themselves, and but for files whose header is quoted.
        max_bytes: longest row.
    """
    lines = _Lines(file, max_bytes)
    header = next(_rows(lines, separator, "csv" if quotes == "auto" else quotes, None), None)
    if not isinstance(header, list):
        if isinstance(header, Rejected):
            yield Rejected("damaged table", f"no header: {header.detail}")
        return
    if quotes == "auto" and lines.first.lstrip().startswith('"'):
        quotes = "csv"
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        yield Rejected("damaged table", f"the header names {repeated[0]!r} twice")
        return
    for row in _rows(lines, separator, quotes, len(header)):
        if isinstance(row, list) and len(row) != len(header):
            row = Rejected(
                "row does not fit the header", f"{len(row)} fields, the header has {len(header)}: {row}"[:200]
            )
        yield row if isinstance(row, Rejected) else dict(zip(header, row, strict=True))


class _Lines:
    """The lines of a file, some of which may be handed back to be read again."""

    def __init__(self, file: BinaryIO, max_bytes: int):
        self._file = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self.max_bytes = max_bytes
        self._again: deque[str | Rejected] = deque()
        self._fresh = self._reread = 0
        self.first = ""

    def next(self) -> str | Rejected | None:
        """The next line, None at the end."""
        if self._again:
            return self._again.popleft()
        line = self._file.readline(self.max_bytes + 1)
        self.first = self.first or line[:100]
        self._fresh += len(line)
        if len(line) <= self.max_bytes:
            return line or None
        size, piece = len(line), line
        while piece and not piece.endswith("\n"):
            piece = self._file.readline(2**20)
            size += len(piece)
        return Rejected("too many bytes", f"a line of {size} characters, limit {self.max_bytes}")

    def hand_back(self, lines: list[str | Rejected]) -> None:
        """Put lines before those that are still to come.

        Raises:
            Rejected: so much was handed back that reading would not end in time.
        """
        self._reread += sum(len(line) for line in lines if isinstance(line, str))
        if self._reread > MAX_REREAD * self._fresh + 64 * 2**20:
            raise Rejected("damaged table", "too many quotes that do not close; see the option `quotes`")
        self._again.extendleft(reversed(lines))


def _rows(lines: _Lines, separator: str, quotes: Quotes, width: int | None) -> Iterator[list[str] | Rejected]:
    csv.field_size_limit(max(lines.max_bytes, csv.field_size_limit()))
    while (line := lines.next()) is not None:
        if isinstance(line, Rejected):
            yield line
        elif line.strip("\r\n"):
            yield _checked(_row(lines, line, separator, quotes, width))


def _row(lines: _Lines, line: str, separator: str, quotes: Quotes, width: int | None) -> list[str] | Rejected:
    plain = line.rstrip("\r\n").split(separator)
    if quotes == "text" or '"' not in line:
        return plain
    taken: list[str | Rejected] = [line]

    def feed() -> Iterator[str]:
        yield line
        size = len(line)
        while size <= lines.max_bytes and (following := lines.next()) is not None:
            taken.append(following)
            if isinstance(following, Rejected):
                return
            size += len(following)
            if quotes == "auto" and len(following.split(separator)) == width:
                return  # it is a row by itself
            yield following

    try:
        row = next(csv.reader(feed(), delimiter=separator, strict=True))
    except csv.Error as error:
        lines.hand_back(taken[1:])
        return plain if quotes == "auto" else Rejected("damaged row", f"{error}: {line.strip()}"[:200])
    if quotes == "csv":
        return row
    if len(row) != width:
        lines.hand_back(taken[1:])
        return plain
    if len(row) != len(plain) or len(taken) > 1:
        return row
    # In `a<TAB>"b"` the quotes are text; in `a<TAB>"say ""b"""` they are not.
    return [read if '""' in written[1:-1] else written for read, written in zip(row, plain, strict=True)]


def _checked(row: list[str] | Rejected) -> list[str] | Rejected:
    if isinstance(row, list):
        try:
            "".join(row).encode()
        except UnicodeEncodeError as error:
            return Rejected("text is not UTF-8", str(error)[:200])
    return row
