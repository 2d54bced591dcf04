"""Memory, disk and time of the plan of a corpus, by the number of samples; and what follows for a billion.

    python benchmarks/plan_memory.py --work /tmp/plan_memory --rows 100000 1000000 10000000

Scans of invented samples are stored first (in a fifth contents that other scans hold too, in a tenth similar texts, in
a tenth similar images); then one participant, a process of its own, makes the plan. Memory is the largest resident set
of that process, which counts the pages of mapped files as well.
"""

import argparse
import functools
import multiprocessing
import resource
import shutil
import time
from pathlib import Path

import numpy as np

from megatron_anyexperts.corpus.corpus import Corpus, Dedup, parse_corpus
from megatron_anyexperts.corpus.near import PERMUTATIONS
from megatron_anyexperts.corpus.planning.layout import Layout, scans_key
from megatron_anyexperts.corpus.planning.pipeline import make_plan, take_census
from megatron_anyexperts.corpus.sample import KINDS
from megatron_anyexperts.corpus.scan import ACCEPTED, Scan, save_scan, scan_path
from megatron_anyexperts.corpus.workers import Share, run_tasks

SCAN_ROWS = 5000
SCANS_APART = 97
"""Scans with numbers this far apart share contents, texts and images."""

FAMILIES = 64
"""Texts, and images, of a scan that others resemble."""

BILLION = 10**9


def synthetic_scan(number: int, rows: int) -> Scan:
    """Scan `number`, deterministic."""
    rng = np.random.default_rng([0, number])
    accepted = np.empty(rows, ACCEPTED)
    for name in ("hash_high", "hash_low", "group"):
        accepted[name] = rng.integers(0, 2**64, rows, dtype=np.uint64)
    accepted["position"] = np.arange(rows)
    accepted["bytes"] = rng.integers(1_000, 200_000, rows)
    accepted["kind"] = rng.integers(0, len(KINDS), rows)
    texts = rng.integers(0, 2**32, (rows, PERMUTATIONS), dtype=np.uint64)
    images = rng.integers(1, 2**64, rows, dtype=np.uint64)
    fifth, tenth = rows // 5, rows // 10
    common = np.random.default_rng([1, number % SCANS_APART])
    for name in ("hash_high", "hash_low", "group"):
        accepted[name][:fifth] = common.integers(0, 2**64, fifth, dtype=np.uint64)
    texts[-tenth:] = common.integers(0, 2**32, (FAMILIES, PERMUTATIONS), dtype=np.uint64)[
        rng.integers(0, FAMILIES, tenth)
    ]
    texts[-tenth:, rng.integers(0, PERMUTATIONS, 4)] = rng.integers(0, 2**32, (tenth, 4), dtype=np.uint64)
    flips = np.uint64(1) << rng.integers(0, 64, tenth, dtype=np.uint64)
    families = common.integers(1, 2**64, FAMILIES, dtype=np.uint64)
    images[-tenth:] = families[rng.integers(0, FAMILIES, tenth)] ^ flips
    return Scan(accepted, [[]] * rows, [], texts, images)


def store_scan(work: Path, rows: int, number: int) -> None:
    """Make scan `number` of a corpus of `rows` samples."""
    path = scan_path(work, number)
    if not path.is_file():
        save_scan(synthetic_scan(number, min(SCAN_ROWS, rows - number * SCAN_ROWS)), path, work / "tmp")


def corpus_of(text: float | None, image: int | None) -> Corpus:
    """A description that asks for this deduplication."""
    corpus = parse_corpus({"name": "synthetic", "sources": [{"type": "text_folder", "path": "."}]})
    return corpus.model_copy(update={"dedup": Dedup(exact=True, near_text=text, near_image=image)})


def measure(corpus: Corpus, work: Path, chunks: int, workers: int, result) -> None:
    """Plan, and send what came out: peak MiB, seconds by stage, shards, duplicates."""
    layout = Layout(corpus, work, scans_key(work, chunks), chunks)
    seconds: dict[str, float] = {}

    def run(steps: list) -> None:
        start = time.monotonic()
        run_tasks(steps, Share(), workers if len(steps) > 1 else 0, lambda handled: None)
        stage = steps[0].stage.split("-")[0]
        seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - start

    take_census(layout, run)
    plan = make_plan(layout, run)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    helpers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    duplicates = sum(1 for _ in plan.duplicates())
    result.send((own / 1024, helpers / 1024, seconds, len(plan.shards), duplicates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--work", type=Path, required=True, help="folder for scans and plans: 800 bytes a sample")
    parser.add_argument("--near-text", type=float, default=0.8, help="0: not looked for")
    parser.add_argument("--near-image", type=int, default=3, help="-1: not looked for")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave scans and plans")
    args = parser.parse_args()
    text = args.near_text or None
    image = args.near_image if args.near_image >= 0 else None
    spawn = multiprocessing.get_context("spawn")
    print("| samples | peak MiB | of the largest worker | shards | duplicates | plan on disk, GB | s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    peaks, times = [], []
    for rows in args.rows:
        work, chunks = args.work / f"{rows}", -(-rows // SCAN_ROWS)
        shutil.rmtree(work / "plan", ignore_errors=True)
        with spawn.Pool(2) as pool:
            pool.map(functools.partial(store_scan, work, rows), range(chunks))
        ours, theirs = spawn.Pipe(duplex=False)
        process = spawn.Process(target=measure, args=(corpus_of(text, image), work, chunks, args.workers, theirs))
        process.start()
        theirs.close()
        own, helper, seconds, shards, duplicates = ours.recv()
        process.join()
        stored = sum(path.stat().st_size for path in (work / "plan").rglob("*") if path.is_file()) / 1e9
        worker = f"{helper:.0f}" if args.workers else "-"
        total = sum(seconds.values())
        print(f"| {rows:,} | {own:.0f} | {worker} | {shards:,} | {duplicates:,} | {stored:.2f} | {total:.0f} |")
        print("  " + ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items()), flush=True)
        peaks.append(own)
        times.append(total)
        if not args.keep:
            shutil.rmtree(work)
    if len(peaks) > 1:
        few, many = args.rows[-2:]
        slope = max(0.0, peaks[-1] - peaks[-2]) * 2**20 / (many - few)
        ahead = peaks[-1] + slope * (BILLION - many) / 2**20
        print(
            f"from {few:,} to {many:,} samples the peak grows by {slope:.1f} bytes a sample; carried on to a billion "
            f"{ahead / 1024:.1f} GiB, time in proportion {times[-1] * BILLION / many / 3600:.0f} h of one core"
        )


if __name__ == "__main__":
    main()
