"""Writes into docs/gpu.md what has run on a GPU, with its figures, and what never has.

    python -m benchmarks.gpu_page [JSON]     # without a file: docs/gpu.json, which `gpu.sh --output` writes
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_machine import ROOT
from benchmarks.gpu_steps import STEPS

PAGE, RESULT = ROOT / "docs/gpu.md", ROOT / "docs/gpu.json"
BEGIN = "<!-- from here on by: python -m benchmarks.gpu_page -->"
END = "<!-- up to here -->"
NEVER = "never run"


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value).replace("|", "\\|")


def outcome(record: dict[str, Any] | None) -> str:
    """What came of a step, in a cell."""
    if record is None:
        return NEVER
    state, figures = record["state"], record.get("figures")
    if state == "ran":
        shown = [f"{name} {cell(value)}" for name, value in figures.items()] if isinstance(figures, dict) else []
        below = ["table below"] if figures and not shown else []
        return "; ".join([f"ran, {record['seconds']:.0f} s", *shown, *below])
    if state in ("failed", "timed out"):
        last = record["last_lines"][-1] if record["last_lines"] else "no output"
        return f"**{state}** after {record['seconds']:.0f} s: `{cell(last)[:160]}`"
    return f"{NEVER}: {state}"


def figures_table(figures: list[dict[str, Any]]) -> list[str]:
    """Rows of a step as a table; a row may lack columns."""
    columns = list(dict.fromkeys(name for row in figures for name in row))
    heads = [name.replace("_", " ") for name in columns]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in figures]


def render(result: dict[str, Any] | None) -> str:
    """The generated part of the page.

    Args:
        result: what `gpu.sh` wrote on a GPU; None if that never happened.

    Raises:
        ValueError: it was measured without a GPU.
    """
    records: dict[str, dict[str, Any]] = {}
    if result is None:
        lines = ["Nothing: no part of this project has been run on a GPU yet, and no speed or memory is known."]
    else:
        machine = result["machine"]
        if machine["gpu"] is None:
            raise ValueError("measured without a GPU; the page takes what benchmarks/gpu.sh wrote on one")
        records = {record["name"]: record for record in result["steps"]}
        lines = [
            f"On one {machine['gpu']}, {result['date'][:10]}, commit {result['commit']}: driver {machine['driver']}, "
            f"torch {machine['torch']}, Triton {machine['triton']}, Megatron-Core {machine['megatron']}, "
            f"Transformer Engine {machine['transformer_engine'] or 'none'}; {result['seconds']:.0f} s in all."
        ]
    lines += ["", "| what | command | result |", "| --- | --- | --- |"]
    lines += [f"| {step.title} | `{step.shown}` | {outcome(records.get(step.name))} |" for step in STEPS]
    for step in STEPS:
        figures = records.get(step.name, {}).get("figures")
        if isinstance(figures, list) and figures:
            lines += ["", f"`{step.name}`:", "", *figures_table(figures)]
    return "\n".join(lines)


def put(page: str, part: str) -> str:
    """The page with its generated part replaced."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{part}\n{END}{rest.split(END)[1]}"


def load(path: Path) -> dict[str, Any] | None:
    """What was measured; None without the file."""
    return json.loads(path.read_text()) if path.exists() else None


def main() -> int:
    """Write the page; exit code 2 if the file does not fit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("json", type=Path, nargs="?", default=RESULT, help="what benchmarks/gpu.sh wrote")
    path = parser.parse_args().json
    try:
        part = render(load(path))
    except ValueError as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return 2
    PAGE.write_text(put(PAGE.read_text(), part))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
