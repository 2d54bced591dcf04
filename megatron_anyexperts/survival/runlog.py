"""Append-only logs of a run: `events.jsonl` for what happened, `metrics.jsonl` and `held_out.jsonl` for how it goes."""

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


def append_held_out(run: Run, iteration: int, **losses: float) -> None:
    """Record the held-out losses after `iteration`: `loss`, and `loss_text` and so on."""
    append(run.held_out, {"iteration": iteration, "time": round(time.time(), 3)} | losses)


def write_expert_load(run: Run, iteration: int, layers: dict[int, list[float]]) -> None:
    """Replace the record of how loaded each expert was in the log interval that ended with `iteration`.

    Args:
        run: the run it belongs to.
        iteration: optimizer steps since the start of the run.
        layers: layer number to received slots of each expert over their mean.
    """
    losses = _LOSSES.setdefault(run.expert_load, LostWrites(str(run.expert_load)))
    unfinished = run.expert_load.with_suffix(".new")
    try:
        run.logs.mkdir(parents=True, exist_ok=True)
        # Not synced: after a crash of the machine the next interval writes it anew.
        unfinished.write_text(json.dumps({"iteration": iteration, "layers": layers}), encoding="utf-8")
        unfinished.replace(run.expert_load)
    except OSError as error:
        losses.lost(error)
    else:
        losses.wrote()


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


def read_metrics(run: Run, layers: bool = True) -> list[dict[str, Any]]:
    """Figures by iteration, ascending; of steps trained twice after a restart the later ones count.

    Args:
        run: that wrote them.
        layers: False leaves the figures by layer, nine tenths of a file, out of all lines but the newest.
    """
    return _by_iteration(run.metrics, layers)


def read_held_out(run: Run) -> list[dict[str, Any]]:
    """Held-out losses by iteration, likewise."""
    return _by_iteration(run.held_out)


def _by_iteration(path: Path, layers: bool = True) -> list[dict[str, Any]]:
    kept: dict[int, dict[str, Any]] = {}
    newest: dict[str, Any] = {}
    for record in read(path):
        if not isinstance(iteration := record.get("iteration"), int):
            continue
        # Going back means that the steps from here on are trained again.
        while kept and next(reversed(kept)) >= iteration:
            kept.popitem()
        if not layers and isinstance(routing := newest.get("routing"), dict):
            routing.pop("layers", None)
        kept[iteration] = newest = record
    return list(kept.values())


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
