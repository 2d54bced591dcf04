"""Write a report of a run: one HTML file with its curves, slots, load, data, faults and configuration.

    anyexperts runs report RUN

Pictures that `anyexperts pictures` has drawn are taken in.
"""

import argparse
import sys
from pathlib import Path

from megatron_anyexperts.analysis.report import write_report
from megatron_anyexperts.analysis.run_record import NoRun, RunRecord


def parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    own.add_argument("--output", type=Path, metavar="DIR", help="folder for report.html (default: RUN)")
    return own


def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(cli)
    try:
        if args.output and args.output.suffix:
            raise NoRun(f"--output {args.output}: name a folder, for report.html")
        print(f"report: {write_report(RunRecord.read(args.run), args.output or args.run)}")
    except NoRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
