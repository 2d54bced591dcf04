"""Print a study's tables, or write them into its page between two marks.

    anyexperts study report studies/importance.yaml --page docs/importance.md
"""

import argparse
import sys
from pathlib import Path

from megatron_anyexperts.commands.study_run import ledger_of
from megatron_anyexperts.studies.declaration import Study, StudyError
from megatron_anyexperts.studies.report import page, with_tables


def parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("study", type=Path, metavar="STUDY", help="the declaration, a YAML file")
    own.add_argument("--ledger", type=Path, metavar="FILE", help="default: ledger.jsonl in a folder named as STUDY")
    own.add_argument("--page", type=Path, metavar="FILE", help="Markdown that has the two marks")
    return own


def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(cli)
    try:
        generated = page(Study.read(args.study), args.study, args.ledger or ledger_of(args.study))
        if args.page is None:
            print(generated)
        else:
            args.page.write_text(with_tables(args.page.read_text(encoding="utf-8"), generated), encoding="utf-8")
    except (StudyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
