#!/usr/bin/env python3
"""Read every shard of a corpus and check hashes, tars, keys, JSON, media and indexes.

Names each damaged shard, what is wrong with it, and the command that rebuilds only that one.
Exit code 0: all is well; 1: something is damaged; 2: there is no corpus.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megatron_anyexperts.corpus.verify import check_shard, corpus_problems, read_manifest


def rebuild_command(output: Path, shard: str) -> str:
    """The command that writes one shard again."""
    try:
        origin = json.loads((output / ".build" / "invocation.json").read_bytes())
    except OSError:
        origin = {"corpus": "CORPUS.yaml", "root": "ROOT"}
    script = Path(__file__).with_name("build_shards.py")
    parts = ["python", script, origin["corpus"], "--root", origin["root"], "--output", output, "--rebuild", shard]
    return shlex.join(map(str, parts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, metavar="DIR", help="folder that build_shards.py made")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes to use (default: one per core)"
    )
    parser.add_argument("--problems", type=int, default=5, help="problems to show per shard (default: 5)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    try:
        manifest = read_manifest(args.corpus)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shards = manifest["shards"]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(args.workers, len(shards))), mp_context=context) as pool:
        results = pool.map(partial(check_shard, args.corpus), shards)
        findings = list(tqdm(results, total=len(shards), unit=" shard", disable=args.quiet))
    damaged = [finding for finding in findings if finding.problems]
    for finding in damaged:
        print(f"DAMAGED {finding.shard}")
        for problem in finding.problems[: args.problems]:
            print(f"  {problem}")
        if len(finding.problems) > args.problems:
            print(f"  ... and {len(finding.problems) - args.problems} more")
        print(f"  rebuild: {rebuild_command(args.corpus, finding.shard)}")
    problems = corpus_problems(args.corpus, manifest, findings)
    for problem in problems:
        print(f"PROBLEM {problem}")
    samples = sum(len(finding.keys) for finding in findings)
    print(
        f"{len(findings)} shards, {samples} samples read; {len(damaged)} shards damaged, {len(problems)} other problems"
    )
    return 1 if damaged or problems else 0


if __name__ == "__main__":
    sys.exit(main())
