"""Who repeats an earlier row: first occurrences of a 128-bit key across groups.

A group hands in each of its keys once, so that a key that most rows share fills no bucket.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_anyexperts.corpus.planning.layout import Layout
from megatron_anyexperts.corpus.planning.parts import load_part, save_parts

FIRST = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u4"), ("count", "<u4"), ("label", "<u8")])
"""A key, its first row within the group, how often it occurs there, and a label of that first row."""

ANSWER = np.dtype([("row", "<u4"), ("before", "<i8"), ("leader", "<i8"), ("label", "<u8")])
"""To a first row within a group: how often its key occurs in earlier groups, the first row of all and its label."""


def first_and_earlier(high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of N 128-bit keys the first index of the same key, and how often it occurs before, int64 [N] each."""
    order = np.lexsort((low, high))
    start = np.maximum.accumulate(np.where(_changes(high[order], low[order]), np.arange(len(order)), 0))
    first, earlier = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    first[order] = order[start]
    earlier[order] = np.arange(len(order)) - start
    return first, earlier


def _changes(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    new = np.ones(len(high), dtype=bool)
    new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    return new


def save_firsts(
    layout: Layout, stem: Path, high: np.ndarray, low: np.ndarray, labels: np.ndarray | None = None,
    rows: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Store the first row of every key of a group by bucket.

    Args:
        layout: of the plan.
        stem: of the files.
        high: uint64 [n], evenly spread.
        low: uint64 [n].
        labels: uint64 [n].
        rows: int64 [n], ascending; rows of the group, by default all.
    """
    first, earlier = first_and_earlier(high, low)
    [chosen] = np.nonzero(earlier == 0)
    records = np.zeros(len(chosen), FIRST)
    records["high"], records["low"] = high[chosen], low[chosen]
    records["row"] = chosen if rows is None else rows[chosen]
    records["count"] = np.bincount(first, minlength=len(first))[chosen]
    if labels is not None:
        records["label"] = labels[chosen]
    save_parts(stem, [(records, layout.bucket_of(records["high"]))], layout.buckets)


def merge_firsts(name: str, spilled: str, layout: Layout, bucket: int, folder: Path) -> None:
    """Compare the first rows of all groups in one bucket and store an answer to each that is not the first of all.

    Args:
        name: of the files that `save_firsts` stored.
        spilled: the stage that did.
        layout: of the plan.
        bucket: to merge.
        folder: of the part.
    """
    found = [load_part(layout.part(spilled, group) / name, bucket, FIRST) for group in range(layout.groups)]
    group = np.repeat(np.arange(layout.groups), [len(part) for part in found])
    records = np.concatenate(found)
    # Stable: equal keys stay in the order of their groups.
    order = np.lexsort((records["low"], records["high"]))
    records, group = records[order], group[order]
    new = _changes(records["high"], records["low"])
    start = np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))
    before = np.cumsum(records["count"], dtype=np.int64) - records["count"]
    later = ~new
    answers = np.empty(int(later.sum()), ANSWER)
    answers["row"] = records["row"][later]
    answers["before"] = (before - before[start])[later]
    answers["leader"] = (layout.row_starts[group] + records["row"])[start][later]
    answers["label"] = records["label"][start][later]
    save_parts(folder / "answers", [(answers, group[later])], layout.groups)


def answers(layout: Layout, stage: str, group: int) -> Iterator[np.ndarray]:
    """What the buckets of `merge_firsts` answer to a group, [n] of ANSWER each."""
    for bucket in range(layout.buckets):
        yield load_part(layout.part(stage, bucket) / "answers", group, ANSWER)


def count_earlier(layout: Layout, stage: str, group: int, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """How often the key of each row of a group occurs at an earlier row of the corpus, int64 [n]."""
    first, earlier = first_and_earlier(high, low)
    before = np.zeros(len(first), np.int64)
    for answer in answers(layout, stage, group):
        before[answer["row"]] = answer["before"]
    return earlier + before[first]
