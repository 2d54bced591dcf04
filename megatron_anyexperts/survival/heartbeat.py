"""Signs of life of each rank, and the stacks they leave behind.

A rank beats once per iteration. The watchdog (`watchdog.py`) compares beats by its own clock, so the nodes' clocks
need not agree.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from .lost_writes import LostWrites
from .run_directory import Run, rank_file

STACK_SIGNAL = signal.SIGUSR2
_MIN_INTERVAL_S = 1.0


class Heartbeat:
    """Writes the heartbeat of one rank; made by `start_heartbeat`."""

    def __init__(self, path: Path, rank: int):
        self._path, self._rank = path, rank
        self._phase, self._written = "", 0.0
        self._losses = LostWrites(f"heartbeat of rank {rank}")

    def beat(self, iteration: int, phase: str = "train") -> None:
        """Say that this rank lives.

        Args:
            iteration: the iteration it is about to work on.
            phase: "start", "train", "save" or "end"; each may have its own patience in the watchdog.
        """
        now = time.monotonic()
        # Thousands of ranks with steps of milliseconds must not flood a shared file system.
        if phase == self._phase and now - self._written < _MIN_INTERVAL_S:
            return
        self._phase, self._written = phase, now
        record = {
            "rank": self._rank,
            "iteration": iteration,
            "phase": phase,
            "time": round(time.time(), 3),
            "node": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
            "pid": os.getpid(),
        }
        try:
            self._path.write_text(json.dumps(record), encoding="utf-8")
        except OSError as error:
            # A full disk must not end a run that could train on; the watchdog then judges by the last beat.
            self._losses.lost(error)
        else:
            self._losses.wrote()


@dataclass(frozen=True)
class Beat:
    """The last sign of life of one rank."""

    rank: int
    iteration: int
    phase: str
    node: str
    time: float


def start_heartbeat(run: Run, rank: int) -> Heartbeat:
    """Begin this rank's heartbeat and make its stack recoverable.

    From now on an uncaught exception, a fatal signal (such as a segmentation fault) and `STACK_SIGNAL` each write the
    stacks of all threads to `RUN/logs/stacks/rankNNNN.txt`. Call it first thing in a rank.
    """
    path = rank_file(run.stacks, rank, "txt")
    try:
        run.create()
        # Unbuffered and kept open: faulthandler writes to the descriptor from inside a signal handler.
        stacks = path.open("wb", buffering=0)
    except OSError as error:
        # A full disk must not keep a run from training; the stacks then go where the other errors go.
        print(f"WARNING: stacks of rank {rank} go to standard error, {path} cannot be opened: {error}", file=sys.stderr)
        stacks = os.fdopen(os.dup(2), "wb", buffering=0)
    faulthandler.enable(stacks, all_threads=True)
    faulthandler.register(STACK_SIGNAL, stacks, all_threads=True, chain=False)
    previous = sys.excepthook

    def record_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # a full disk must not hide the exception from the console
            stacks.write("".join(traceback.format_exception(kind, error, trace)).encode())
        previous(kind, error, trace)

    sys.excepthook = record_exception
    heartbeat = Heartbeat(rank_file(run.heartbeats, rank, "json"), rank)
    heartbeat.beat(0, "start")
    return heartbeat


def read_beats(run: Run) -> dict[int, Beat]:
    """The last beat of each rank that has beaten; a file caught in the middle of a write is left out."""
    beats = {}
    for path in run.heartbeats.glob("rank*.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            beat = Beat(record["rank"], record["iteration"], record["phase"], record["node"], record["time"])
        except (OSError, ValueError, KeyError):
            continue
        beats[beat.rank] = beat
    return beats


def clear(run: Run) -> None:
    """Forget the beats and stacks of an earlier attempt, before a new one starts."""
    for folder in (run.heartbeats, run.stacks):
        for path in folder.glob("rank*"):
            path.unlink(missing_ok=True)


def last_stack(run: Run, rank: int, lines: int = 40) -> str:
    """The end of what a rank left behind, or "" when it left nothing."""
    path = rank_file(run.stacks, rank, "txt")
    if not path.exists():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
