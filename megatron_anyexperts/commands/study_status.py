"""Say which runs of a declared study are in its ledger.

    anyexperts study status studies/importance.yaml
"""

import argparse
import sys
from pathlib import Path

from megatron_anyexperts.analysis.tables import table
from megatron_anyexperts.commands.study_run import ledger_of
from megatron_anyexperts.studies import ledger
from megatron_anyexperts.studies.declaration import Run, Study, StudyError


def parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("study", type=Path, metavar="STUDY", help="the declaration, a YAML file")
    own.add_argument("--ledger", type=Path, metavar="FILE", help="default: ledger.jsonl in a folder named as STUDY")
    return own


def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(cli)
    try:
        study = Study.read(args.study)
        records, notes = ledger.read(args.ledger or ledger_of(args.study))
        found, others = ledger.of_study(study, records)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [
        [name, *("done" if Run(name, seed) in found else "missing" for seed in study.seeds)] for name in study.settings
    ]
    print(table(["setting", *(f"seed {seed}" for seed in study.seeds)], rows))
    print(f"{len(found)} of {len(study.runs)} runs" + (f"; {others} lines of other declarations" if others else ""))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return 0
