"""Show what a corpus is made of: tokens, languages, sources, rejections; sizes, durations and lengths; plots."""

import argparse
import json
import sys
from pathlib import Path

from megatron_anyexperts.corpus.plots import plot
from megatron_anyexperts.corpus.stats import Measured, measure_samples, quantile_table, quantiles, share_table
from megatron_anyexperts.corpus.summary import summary
from megatron_anyexperts.corpus.verify import read_manifest


def parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    own = argparse.ArgumentParser(description=__doc__)
    own.add_argument("corpus", type=Path, metavar="DIR", help="folder of a built corpus")
    own.add_argument("--output", "--plots", type=Path, metavar="DIR", help="folder for plots (default: none)")
    own.add_argument("--json", action="store_true", help="print JSON")
    own.add_argument(
        "--samples", type=int, default=20_000, help="samples of each kind to measure at most (default: 20000)"
    )
    return own


def report(manifest: dict, measured: Measured, corpus: Path) -> str:
    """Everything as text."""
    shares = (("tokens", "modality", "tokens"), ("sources", "source", "samples"), ("languages", "language", "samples"))
    tables = [share_table(manifest[name], *columns) for name, *columns in shares]
    return "\n\n".join([summary(manifest, corpus), *tables, quantile_table(measured)])


def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(cli)
    try:
        manifest = read_manifest(args.corpus)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    measured = measure_samples(args.corpus, manifest, max(1, args.samples))
    if args.json:
        counts = {name: manifest[name] for name in ("kinds", "tokens", "sources", "languages", "rejected")}
        print(json.dumps(counts | {"measured": quantiles(measured)}))
    else:
        print(report(manifest, measured, args.corpus))
    if args.output:
        for path in plot(manifest, measured, args.output):
            print(f"plot: {path}", file=sys.stderr)
    return 0
