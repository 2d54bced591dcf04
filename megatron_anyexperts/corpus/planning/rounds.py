"""Who of many similar rows stays: the answer of one pass in plan order, found by comparing in parts.

A row is dropped when an earlier row that stays is similar to it. In a round, the undecided rows that have the same key
in a table form a run; its first rows, the pivots, are compared with all later ones. A row is decided when it was a
pivot in all of its runs, or when a row that stays is similar to it. All that are undecided before a row can only
matter if they are pivots where it is one, so deciding in plan order gives what comparing all pairs would give; the
first undecided row is always decided. A cluster of n similar rows costs one round and pivots * n comparisons.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_anyexperts.corpus.planning.layout import Layout
from megatron_anyexperts.corpus.planning.parts import load_bits, load_part, save_bits, save_parts
from megatron_anyexperts.corpus.planning.similar import KEYED, Search

EDGE = np.dtype([("earlier", "<i8"), ("later", "<i8")])
"""Two similar rows."""

STAYS, DROPPED, WAITING = range(3)

GROWTH = 8
PAIRS_AT_ONCE = 2**16


def compare(search: Search, number: int, layout: Layout, bucket: int, folder: Path) -> None:
    """Compare the undecided rows in one bucket of one table.

    Args:
        search: what is compared.
        number: of the round, from 0.
        layout: of the plan.
        bucket: table * buckets + bucket.
        folder: of the part.
    """
    runs = _undecided_runs(search, number, layout, bucket)
    pivots = layout.sizes.pivots * GROWTH**number
    runs.rows[runs.places >= pivots].tofile(folder / "blocked.bin")
    edges = [np.empty(0, EDGE)]
    for start in range(0, len(runs.rows), layout.sizes.compared_rows):
        members = np.arange(start, min(start + layout.sizes.compared_rows, len(runs.rows)))
        edges += _edges(search, layout, bucket // layout.buckets, runs, members, pivots)
    found = np.concatenate(edges)
    save_parts(folder / "edges", [(found, layout.group_of(found["later"]))], layout.groups)


@dataclass(frozen=True)
class Runs:
    """The M members of runs of at least two, run by run, in each in plan order."""

    rows: np.ndarray
    """int64 [M]."""
    places: np.ndarray
    """int64 [M], place of each in its run, from 0."""


def _undecided_runs(search: Search, number: int, layout: Layout, bucket: int) -> Runs:
    keys, rows = [], []
    for group in range(layout.groups):
        records = load_part(layout.part(f"{search.name}-bands", group) / "bands", bucket, KEYED)
        found = records["row"] + layout.row_starts[group]
        if number:
            undecided = load_bits(layout.part(f"{search.name}-round", number - 1) / "waiting.bits", found)
            records, found = records[undecided], found[undecided]
        keys.append(records["key"])
        rows.append(found)
    key, row = np.concatenate(keys), np.concatenate(rows)
    order = np.argsort(key, kind="stable")
    key, row = key[order], row[order]
    same = np.zeros(len(key) + 1, dtype=bool)
    same[1:-1] = key[1:] == key[:-1]
    shared = same[:-1] | same[1:]
    row, first = row[shared], ~same[:-1][shared]
    index = np.arange(len(row))
    return Runs(row, index - np.maximum.accumulate(np.where(first, index, 0)))


def _edges(
    search: Search, layout: Layout, table: int, runs: Runs, members: np.ndarray, pivots: int
) -> Iterator[np.ndarray]:
    """Edges from pivots to consecutive members; the pivots of a run that began before them are loaded as well."""
    start = int(members[0])
    begin = start - int(runs.places[start])
    before = np.arange(begin, min(begin + pivots, start))
    signatures = _signatures(search, layout, runs.rows[np.concatenate([before, members])])

    def loaded(index: np.ndarray) -> np.ndarray:
        return signatures[np.where(index < start, index - begin, index - start + len(before))]

    for pivot in range(pivots):
        members = members[runs.places[members] > pivot]
        if not len(members):
            return
        for part in range(0, len(members), PAIRS_AT_ONCE):
            later = members[part : part + PAIRS_AT_ONCE]
            earlier = later - runs.places[later] + pivot
            similar = search.similar(table, loaded(earlier), loaded(later))
            edges = np.empty(int(similar.sum()), EDGE)
            edges["earlier"], edges["later"] = runs.rows[earlier[similar]], runs.rows[later[similar]]
            yield edges


def _signatures(search: Search, layout: Layout, rows: np.ndarray) -> np.ndarray:
    group = layout.group_of(rows)
    order = np.argsort(group, kind="stable")
    bounds = np.searchsorted(group[order], np.arange(layout.groups + 1))
    parts = []
    for number in range(layout.groups):
        chosen = order[bounds[number] : bounds[number + 1]]
        parts.append(search.signatures(layout, number)[rows[chosen] - layout.row_starts[number]])
    signatures = np.concatenate(parts)
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return signatures[back]


def decide(search: Search, layout: Layout, number: int, folder: Path) -> None:
    """Decide in plan order what can be decided after the comparisons of a round.

    Holds a byte for each row of the corpus: the only thing in planning that grows with it.
    """
    count = int(layout.row_starts[-1])
    memory = bytearray(count)
    state = np.frombuffer(memory, np.uint8)
    if number:
        _restore(state, layout.part(f"{search.name}-round", number - 1))
    parts = [layout.part(f"{search.name}-pairs-{number}", bucket) for bucket in range(search.tables * layout.buckets)]
    for part in parts:
        state[np.fromfile(part / "blocked.bin", "<i8")] = WAITING
    parts = [part for part in parts if (part / "edges.bin").stat().st_size]
    for group in range(layout.groups if parts else 0):
        within = [_from_earlier_groups(state, part, layout, group) for part in parts]
        edges = np.concatenate(within)
        edges = edges[np.argsort(edges["later"], kind="stable")]
        # In order, so the earlier row of an edge is decided before the later one.
        for earlier, later in zip(edges["earlier"].tolist(), edges["later"].tolist(), strict=True):
            if memory[earlier] == STAYS:
                memory[later] = DROPPED
            elif memory[earlier] == WAITING and memory[later] == STAYS:
                memory[later] = WAITING
    save_bits(folder / "dropped.bits", state, DROPPED)
    save_bits(folder / "waiting.bits", state, WAITING)
    (folder / "waiting.json").write_text(json.dumps(int(np.count_nonzero(state == WAITING))))


def _restore(state: np.ndarray, previous: Path) -> None:
    """Rows that were dropped before; the others stay unless they turn out to wait or to be dropped."""
    step = 2**23
    for start in range(0, len(state), step):
        rows = np.arange(start, min(start + step, len(state)))
        state[rows] = np.where(load_bits(previous / "dropped.bits", rows), DROPPED, STAYS)


def _from_earlier_groups(state: np.ndarray, part: Path, layout: Layout, group: int) -> np.ndarray:
    """Apply the edges of a part that come from earlier groups, which are decided; return those within the group."""
    edges = load_part(part / "edges", group, EDGE)
    outside = edges["earlier"] < layout.row_starts[group]
    known = state[edges["earlier"][outside]]
    later = edges["later"][outside]
    state[later[known == STAYS]] = DROPPED
    waiting = later[known == WAITING]
    state[waiting[state[waiting] == STAYS]] = WAITING
    return edges[~outside]


def undecided(layout: Layout, search: Search, number: int) -> int:
    """How many rows a round left undecided."""
    return json.loads((layout.part(f"{search.name}-round", number) / "waiting.json").read_bytes())
