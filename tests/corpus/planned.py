"""Plans of given scans."""

import tempfile
from pathlib import Path

from megatron_anyexperts.corpus.corpus import Corpus
from megatron_anyexperts.corpus.plan import Plan, ShardPlan, Span
from megatron_anyexperts.corpus.planning.layout import Layout, Sizes, scans_key
from megatron_anyexperts.corpus.planning.pipeline import make_plan, take_census
from megatron_anyexperts.corpus.scan import Scan, save_scan, scan_path
from megatron_anyexperts.corpus.workers import Share, run_tasks

TINY = Sizes(group_rows=3, bucket_rows=2, pivots=1, compared_rows=2)

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Folder in memory where there is one: parts are synced to disk, many in a test of many plans."""


def run_here(steps: list) -> None:
    """Do the steps of a stage in this process."""
    run_tasks(steps, Share(), 0, lambda handled: None)


def layout_of(corpus: Corpus, scans: list[Scan], work: Path, sizes: Sizes = TINY) -> Layout:
    """Store scans; returns the layout of their plan."""
    for number, scan in enumerate(scans):
        save_scan(scan, scan_path(work, number), work / "tmp")
    return Layout(corpus, work, scans_key(work, len(scans)), len(scans), sizes)


def plan_on_disk(corpus: Corpus, scans: list[Scan], work: Path, sizes: Sizes = TINY) -> Plan:
    """Store scans and plan them."""
    layout = layout_of(corpus, scans, work, sizes)
    take_census(layout, run_here)
    return make_plan(layout, run_here)


def plan_in_parts(
    corpus: Corpus, scans: list[Scan], sizes: Sizes = TINY
) -> tuple[list[ShardPlan], list[tuple[int, int, str]], dict[str, Span]]:
    """Shards, duplicates and spans of the plan of scans."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        plan = plan_on_disk(corpus, scans, Path(folder), sizes)
        shards = [shard.load() for shard in plan.shards]
        assert [shard.digest for shard in shards] == [shard.digest for shard in plan.shards]
        return shards, list(plan.duplicates()), plan.spans
