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
    parts = [origin["corpus"], "--root", origin["root"], "--output", output, "--rebuild", shard]
    return shlex.join([sys.executable, "-m", "megatron_anyexperts", "corpus", "build", *map(str, parts)])


def parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("corpus", type=Path, metavar="DIR", help="folder of a built corpus")
    own.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes to use (default: one per core)"
    )
    own.add_argument("--problems", type=int, default=5, help="problems to show per shard (default: 5)")
    own.add_argument("--quiet", action="store_true", help="no progress bar")
    own.add_argument("--json", action="store_true", help="print JSON")
    return own


def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(cli)
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
    problems = corpus_problems(args.corpus, manifest, findings)
    samples = sum(len(finding.keys) for finding in findings)
    code = 1 if damaged or problems else 0
    if args.json:
        rebuild = {one.shard: rebuild_command(args.corpus, one.shard) for one in damaged}
        shown = [{"shard": one.shard, "problems": one.problems, "rebuild": rebuild[one.shard]} for one in damaged]
        print(json.dumps({"shards": len(findings), "samples": samples, "damaged": shown, "problems": problems}))
        return code
    for finding in damaged:
        print(f"DAMAGED {finding.shard}")
        for problem in finding.problems[: args.problems]:
            print(f"  {problem}")
        if len(finding.problems) > args.problems:
            print(f"  ... and {len(finding.problems) - args.problems} more")
        print(f"  rebuild: {rebuild_command(args.corpus, finding.shard)}")
    for problem in problems:
        print(f"PROBLEM {problem}")
    print(
        f"{len(findings)} shards, {samples} samples read; {len(damaged)} shards damaged, {len(problems)} other problems"
    )
    return code
