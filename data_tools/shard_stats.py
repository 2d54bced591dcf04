#!/usr/bin/env python3
"""Show what a corpus is made of: tokens, languages, sources, rejections; sizes, durations and lengths; plots."""

import argparse
import sys
from pathlib import Path

from megatron_anyexperts.corpus.stats import measure_samples, plot, quantile_table, share_table
from megatron_anyexperts.corpus.summary import summary
from megatron_anyexperts.corpus.verify import read_manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, metavar="DIR", help="folder that build_shards.py made")
    parser.add_argument("--plots", type=Path, help="folder for plots (default: none)")
    parser.add_argument(
        "--samples", type=int, default=20_000, help="samples of each kind to measure at most (default: 20000)"
    )
    args = parser.parse_args()
    try:
        manifest = read_manifest(args.corpus)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    measured = measure_samples(args.corpus, manifest, max(1, args.samples))
    print(summary(manifest, args.corpus), end="\n\n")
    print(share_table(manifest["tokens"], "modality", "tokens"), end="\n\n")
    print(share_table(manifest["sources"], "source", "samples"), end="\n\n")
    print(share_table(manifest["languages"], "language", "samples"), end="\n\n")
    print(quantile_table(measured))
    if args.plots:
        for path in plot(manifest, measured, args.plots):
            print(f"plot: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
