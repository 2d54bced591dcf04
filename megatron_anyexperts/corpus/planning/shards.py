"""Last stage: fill shards with the rows that stay, in plan order, and list the duplicates."""

import contextlib
import json
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_anyexperts.corpus.corpus import Shards
from megatron_anyexperts.corpus.plan import (
    DUPLICATE,
    PLANNED,
    SPLITS,
    Plan,
    ShardFile,
    ShardPlan,
    Span,
    cut,
    is_validation,
)
from megatron_anyexperts.corpus.planning.layout import Layout
from megatron_anyexperts.corpus.planning.survivors import REASONS, verdict_of
from megatron_anyexperts.corpus.sample import KINDS


class _Stream:
    """Rows of one kind and split on their way to a file, of which only those of the open shard are in memory."""

    def __init__(self, name: str, limits: Shards, file: BinaryIO) -> None:
        self._name, self._limits, self._file, self._written = name, limits, file, 0
        self._open = np.empty(0, PLANNED)
        self.shards: list[tuple[str, str, int, int]] = []

    def add(self, rows: np.ndarray) -> None:
        """Append rows, [n] of PLANNED, and close the shards that they fill."""
        rows = np.concatenate([self._open, rows])
        parts = cut(rows["sample"]["bytes"], self._limits)
        for part in parts[:-1]:
            self._close(rows[part])
        self._open = rows[parts[-1]].copy() if parts else rows

    def end(self) -> None:
        """Close the last shard."""
        if len(self._open):
            self._close(self._open)

    def _close(self, rows: np.ndarray) -> None:
        name = f"{self._name}/shard-{len(self.shards):06d}.tar"
        start = self._written
        self._written += len(rows)
        self.shards.append((name, ShardPlan.of(name, rows).digest, start, self._written))
        rows.tofile(self._file)


def cut_shards(layout: Layout, _: None, folder: Path) -> None:
    """Store the rows of all shards and all duplicates, and what `load_plan` reads."""
    corpus, spans = layout.corpus, {}
    names = [f"{kind}/{split}" for kind in KINDS for split in SPLITS]
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / _rows_file(name), "wb")) for name in (*names, *REASONS)}
        streams = {name: _Stream(name, corpus.shards, files[name]) for name in names}
        for group in range(layout.groups):
            rows = layout.rows_of(group)
            reasons, repeats = verdict_of(layout, group)
            for number, reason in enumerate(REASONS, 1):
                _put_duplicates(rows[reasons == number], files[reason])
            planned = np.empty(len(rows), PLANNED)
            planned["sample"], planned["chunk"], planned["repeat"] = rows["sample"], rows["chunk"], repeats
            planned = planned[reasons == 0]
            held_out = is_validation(planned["sample"]["group"], corpus.validation_fraction)
            for number, kind in enumerate(KINDS):
                of_kind = planned["sample"]["kind"] == number
                for split, side in zip(SPLITS, (~held_out, held_out), strict=True):
                    streams[f"{kind}/{split}"].add(planned[of_kind & side])
                if of_kind.any():
                    spans[kind] = Span.of(planned["sample"]["group"][of_kind]).joined(spans.get(kind))
        for stream in streams.values():
            stream.end()
    shards = [shard for stream in streams.values() for shard in stream.shards]
    (folder / "plan.json").write_text(json.dumps({"shards": shards, "spans": spans}))


def _put_duplicates(rows: np.ndarray, file: BinaryIO) -> None:
    duplicates = np.empty(len(rows), DUPLICATE)
    duplicates["chunk"], duplicates["position"] = rows["chunk"], rows["sample"]["position"]
    duplicates.tofile(file)


def load_plan(folder: Path) -> Plan:
    """Read what `cut_shards` stored; the rows of a shard are read when they are asked for."""
    content = json.loads((folder / "plan.json").read_bytes())
    shards = [
        ShardFile(name, digest, folder / _rows_file(name.rpartition("/")[0]), start, stop)
        for name, digest, start, stop in content["shards"]
    ]
    spans = {kind: Span(*span) for kind, span in content["spans"].items()}
    return Plan(shards, spans, {reason: folder / _rows_file(reason) for reason in REASONS})


def _rows_file(name: str) -> str:
    return name.replace("/", "-").replace(" ", "-") + ".bin"
