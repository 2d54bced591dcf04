"""Show one run: its state, its losses, what it was fed, and which files lie where.

    anyexperts runs show RUN
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_anyexperts.analysis.data_facts import data_facts
from megatron_anyexperts.analysis.run_files import files_of
from megatron_anyexperts.analysis.run_record import NoRun, RunRecord
from megatron_anyexperts.analysis.tables import figure, table
from megatron_anyexperts.survival.status import printable, screen


def parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    own.add_argument("--json", action="store_true", help="print JSON")
    return own


def held_out(record: RunRecord, shown: int = 5) -> str:
    """The newest evaluations, by kind of sample."""
    keys = list(dict.fromkeys(key for row in record.held_out for key in row if key.startswith("loss")))
    heads = ["held out at", *(key.removeprefix("loss_").replace("loss", "all") for key in keys)]
    rows = [[row["iteration"], *(figure(row.get(key)) for key in keys)] for row in record.held_out[-shown:]]
    return table(heads, rows) if rows else "held out      nothing was evaluated"


def fed(record: RunRecord) -> str:
    """One line about the data."""
    facts = data_facts(record)
    tokens = ", ".join(f"{name} {count:,}" for name, count in facts.tokens.items()) or "none yet"
    lost = f"{facts.read:,} samples read, {facts.lost:,} lost, {len(facts.quarantined):,} in quarantine"
    return f"data          {printable(facts.blend or 'unknown')}\ntokens        {tokens}\nsamples       {lost}"


def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(cli)
    try:
        record = RunRecord.read(args.run)
    except NoRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    files = files_of(record.run)
    if args.json:
        facts = {"run": record.row(), "targets": record.targets, "data": asdict(data_facts(record))}
        print(json.dumps(facts | {"configuration": record.config, "files": {path: size for path, _, size in files}}))
        return 0
    rows = [[path, f"{size:,}", purpose] for path, purpose, size in files]
    parts = [screen(record.run).rstrip(), fed(record), held_out(record), table(["file", "bytes", "what"], rows)]
    print("\n\n".join(parts))
    return 0
