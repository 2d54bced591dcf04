"""Compare runs: losses at the same steps, slots, speed, and the flags in which they differ; a picture on request.

    anyexperts runs compare RUN RUN --output comparison
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_anyexperts.analysis.comparison import compare, names
from megatron_anyexperts.analysis.run_record import NoRun, RunRecord
from megatron_anyexperts.analysis.tables import figure, table


def parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directories of two or more runs")
    own.add_argument("--output", type=Path, metavar="DIR", help="folder for comparison.png and comparison.json")
    own.add_argument("--json", action="store_true", help="print JSON")
    return own


def text(compared: dict[str, Any]) -> str:
    """Both tables."""
    step, evaluation = compared["common_step"], compared["common_evaluation"]
    heads = ["run", "state", "step", "loss", f"loss at {step}", f"held out at {evaluation}"]
    rows = [
        [
            name,
            row["state"],
            row["step"],
            figure(row["loss"]),
            figure(row["loss_at_common_step"]),
            figure(row["held_out_loss_at_common_evaluation"]),
            figure(row["slots"], ".3f"),
            figure(row["real_slots"], ".3f"),
            figure(row["tokens_per_s"], ",.0f"),
            figure(row["load_max_over_mean"], ".3f"),
            row["restarts"],
        ]
        for name, row in compared["runs"].items()
    ]
    tables = [table([*heads, "slots", "real slots", "tokens/s", "rank load", "restarts"], rows)]
    changed = compared["configuration"]
    if changed:
        runs = list(compared["runs"])
        differing = [[flag, *(values.get(run) for run in runs)] for flag, values in changed.items()]
        tables.append(table(["flag", *runs], differing))
    else:
        tables.append("the configurations are the same")
    return "\n\n".join(tables)


def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(cli)
    try:
        folders = list(dict.fromkeys(folder.resolve() for folder in args.runs))
        if len(folders) < 2:
            raise NoRun(f"{len(folders)} run is given; name two or more different ones")
        if args.output and args.output.suffix:
            raise NoRun(f"--output {args.output}: name a folder, for comparison.png and comparison.json")
        records = dict(zip(names(folders), map(RunRecord.read, folders), strict=True))
    except NoRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    compared = compare(records)
    print(json.dumps(compared, indent=2) if args.json else text(compared))
    if args.output:
        from megatron_anyexperts.analysis import charts

        charts.write_png(charts.comparison(records), args.output / "comparison.png")
        (args.output / "comparison.json").write_text(json.dumps(compared, indent=2) + "\n", encoding="utf-8")
        print(f"picture: {args.output / 'comparison.png'}", file=sys.stderr)
    return 0
