"""Run what a declared study lacks: each of its settings with each of its seeds, in its ledger once.

    anyexperts study run studies/importance.yaml --input demo=runs/demo --work runs/importance

Start it again after whatever ended it. Start it several times for runs at the same time.
"""

import argparse
import sys
from pathlib import Path

from megatron_anyexperts.studies.declaration import Study, StudyError
from megatron_anyexperts.studies.runner import Place, run_missing


def ledger_of(declaration: Path) -> Path:
    """Where a study's ledger is unless it is named: in a folder beside the declaration, of the same name."""
    return declaration.with_suffix("") / "ledger.jsonl"


def parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("study", type=Path, metavar="STUDY", help="the declaration, a YAML file")
    own.add_argument("--input", action="append", default=[], metavar="NAME=PATH", help="of the study's inputs")
    own.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the runs")
    own.add_argument("--ledger", type=Path, metavar="FILE", help="default: ledger.jsonl in a folder named as STUDY")
    own.add_argument("--setting", action="append", metavar="NAME", help="run this one only; repeat for more")
    return own


def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(cli)
    try:
        study = Study.read(args.study)
        pairs = [each.partition("=") for each in args.input]
        inputs = {name: Path(path) for name, _, path in pairs}
        unknown = sorted(inputs.keys() - study.inputs.keys())
        if unknown:
            raise StudyError(f"--input {', '.join(unknown)}: the study has {', '.join(study.inputs) or 'none'}")
        place = Place(args.ledger or ledger_of(args.study), args.work.resolve(), inputs)
        for run, seconds in run_missing(study, place, args.setting or list(study.settings)):
            print(f"{run.setting}, seed {run.seed}: {seconds:.0f} s", flush=True)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
