"""List the runs below a folder: how far each is, its losses, slots and speed.

    anyexperts runs list runs
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_anyexperts.analysis.report import clock
from megatron_anyexperts.analysis.run_record import NoRun, RunRecord, find_runs
from megatron_anyexperts.analysis.tables import figure, table

HEADS = ("run", "state", "step", "of", "loss", "held out", "real slots", "tokens/s", "started (UTC)", "restarts")


def parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="DIR", help="default: runs")
    own.add_argument("--json", action="store_true", help="print JSON")
    return own


def cells(name: str, row: dict[str, Any]) -> list[Any]:
    """One line of the table."""
    return [
        name,
        row["state"],
        figure(row["step"], ","),
        figure(row["of"], ","),
        figure(row["loss"]),
        figure(row["held_out_loss"]),
        figure(row["real_slots"], ".2f"),
        figure(row["tokens_per_s"], ",.0f"),
        None if row["started"] is None else clock(row["started"]),
        row["restarts"],
    ]


def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(cli)
    try:
        rows = {str(path.relative_to(args.folder)): RunRecord.read(path).row() for path in find_runs(args.folder)}
    except NoRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(rows, indent=2))
    elif rows:
        print(table(HEADS, [cells(name, row) for name, row in rows.items()]))
    else:
        print(f"no run below {args.folder}: a run is a folder with logs/events.jsonl, as --run-dir makes it")
    return 0
