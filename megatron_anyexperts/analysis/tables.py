"""Plain tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_anyexperts.survival.status import printable


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as their content, numbers to the right; control characters in cells are escaped.

    Args:
        heads: of the columns.
        rows: cells; None is shown as "-".
    """
    texts = [[printable("-" if cell is None else str(cell)) for cell in row] for row in [heads, *rows]]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    right = [all(_numeric(cell) for cell in column[1:]) for column in zip(*texts, strict=True)]
    lines = []
    for row in texts:
        cells = zip(row, widths, right, strict=True)
        lines.append("  ".join(cell.rjust(width) if to else cell.ljust(width) for cell, width, to in cells).rstrip())
    return "\n".join(lines)


def figure(value: float | None, form: str = ",.4f") -> str | None:
    """A number as text; None stays None."""
    return None if value is None else format(value, form)


def _numeric(cell: str) -> bool:
    return cell == "-" or cell.lstrip("-")[:1].isdigit()
