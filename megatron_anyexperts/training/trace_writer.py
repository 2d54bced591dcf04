"""Writes the files of a routing trace from a thread of its own, within a bound, and says what it leaves out."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_anyexperts import trace_file
from megatron_anyexperts.survival.lost_writes import LostWrites

Tables = dict[str, dict[str, np.ndarray]]
_WAITING = 2


class TraceWriter:
    """Writes what steps left, one after the other, while training goes on.

    A step that comes while `_WAITING` others wait is left out, which is counted and said: training never waits. So are
    files that the disk does not take.

    Args:
        folder: of the trace.
        rank: global rank, which names the files.
        most_bytes: of this rank's files; the step that passes it is the last one traced. Files that are there count.
    """

    def __init__(self, folder: Path, rank: int, most_bytes: int):
        self.folder, self.rank, self.most_bytes = folder, rank, most_bytes
        mine = [path for table in trace_file.TABLES for path in folder.glob(f"{table}/*-rank{rank:04d}*.parquet")]
        self.bytes = sum(path.stat().st_size for path in mine)
        self.left_out = 0
        self._losses = LostWrites(f"routing trace of rank {rank}")
        self._queue: queue.Queue[tuple[int, int | None, Callable[[], Tables]] | None] = queue.Queue(_WAITING)
        # A daemon, so that a crash of training does not wait for the disk; `close` does.
        self._thread = threading.Thread(target=self._run, name="routing trace", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether nothing more may be written."""
        return self.bytes >= self.most_bytes

    def submit(self, step: int, tables: Callable[[], Tables], part: int | None = None) -> None:
        """Write what `tables` returns; it is called in the thread.

        Args:
            step: names the files.
            tables: columns by name of one or both tables.
            part: of a step that comes in parts, as in evaluation: none is left out, the caller waits for room.
        """
        try:
            self._queue.put((step, part, tables), block=part is not None)
        except queue.Full:
            self.left_out += 1
            if self.left_out.bit_count() == 1:  # the 1st, 2nd, 4th, ...
                said = f"{self.left_out} step(s) left out: the disk is slower than the steps"
                print(f"WARNING: routing trace of rank {self.rank}: {said}", file=sys.stderr)

    def close(self) -> None:
        """Wait until all is written."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            step, part, tables = item
            try:
                for table, columns in tables().items():
                    path = trace_file.path_of(self.folder, table, step, self.rank, part)
                    self.bytes += trace_file.write(path, table, columns)
            except Exception as error:  # whatever it is, training is worth more than its trace
                self._losses.lost(error)
                continue
            self._losses.wrote()
            if self.full:
                said = f"{self.bytes} bytes reach the bound of {self.most_bytes}: nothing is traced after step {step}"
                print(f"routing trace of rank {self.rank}: {said}", file=sys.stderr)
