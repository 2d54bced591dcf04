"""Append-only logs of a run: `events.jsonl` for what happened, `metrics.jsonl` for how training goes."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .lost_writes import LostWrites
from .run_directory import Run

_LOSSES: dict[Path, LostWrites] = {}


def append_event(run: Run, event: str, **fields: Any) -> bool:
    """Record one happening with the time of day; `fields` are usually reason, iteration and restart.

    Returns whether it was written.

    Args:
        run: the run it happened to.
        event: a single word. The launcher writes "attempt", "preflight", "hang", "exit", "stop" and "task"; training
            writes "start", "load", "saved", "save_failed", "not_saved", "room", "config", "lock", "fallback", "exit",
            "crash" and "finished".
    """
    return append(run.events, {"time": round(time.time(), 3), "event": event} | fields)


def append_metrics(run: Run, iteration: int, **figures: Any) -> None:
    """Record the figures of the log interval that ended with `iteration`.

    Args:
        run: the run they belong to.
        iteration: optimizer steps since the start of the run.
        figures: `loss`, `tokens_per_s`, `consumed_samples`, `train_iters`, `load_max_over_mean`,
            `data_wait_share` (0 to 1), `loss_text` and so on; floats or ints.
    """
    append(run.metrics, {"iteration": iteration, "time": round(time.time(), 3)} | figures)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Every complete record of a log; a line torn by a crash is left out, an absent file has none."""
    if not path.exists():
        return
    try:
        lines = path.open(encoding="utf-8", errors="replace")
    except OSError as error:
        print(f"WARNING: {path} cannot be read and counts as empty: {error}", file=sys.stderr)
        return
    with lines:
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                yield record


def read_events(run: Run) -> list[dict[str, Any]]:
    """All events, oldest first."""
    return list(read(run.events))


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """Figures by iteration, ascending; of an iteration trained twice after a restart the later one counts."""
    latest = {record["iteration"]: record for record in read(run.metrics) if "iteration" in record}
    return [latest[iteration] for iteration in sorted(latest)]


def append(path: Path, record: dict[str, Any]) -> bool:
    """Add one line to any log of this kind; a full disk loses the line, counted and said, not the run.

    Returns whether it was written.
    """
    losses = _LOSSES.setdefault(path, LostWrites(str(path)))
    try:
        _write_line(path, record)
    except OSError as error:
        losses.lost(error)
        return False
    losses.wrote()
    return True


def _write_line(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, separators=(",", ":")) + "\n"
    # One write on an O_APPEND descriptor keeps lines of several writers whole. The leading newline of a file whose
    # last line was torn by a crash keeps the torn line from swallowing this record.
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = "\n" + line
        data = line.encode()
        if os.write(descriptor, data) < len(data):  # what is there is a torn line, which readers leave out
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)
