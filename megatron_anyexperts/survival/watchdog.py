"""Ends a step in which a rank has stopped giving signs of life."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from . import runlog
from .heartbeat import STACK_SIGNAL, Beat, last_stack, read_beats
from .run_directory import Run


@dataclass(frozen=True)
class Patience:
    """Seconds without a new beat after which a rank counts as hung."""

    train: float
    start: float
    """Also for saving and for ending: each may take much longer than an iteration."""

    def of(self, phase: str) -> float:
        return self.train if phase == "train" else self.start


def overdue(
    beats: Mapping[int, Beat], silence_s: Mapping[int, float], ranks: int, elapsed_s: float, patience: Patience
) -> list[int]:
    """Ranks that have been silent for too long, the likeliest culprit first.

    Args:
        beats: last beat of each rank that has beaten.
        silence_s: seconds since that beat changed, by the watcher's clock.
        ranks: how many ranks there are.
        elapsed_s: seconds since the step was started; a rank without any beat is silent for that long.
        patience: limits by phase.

    Returns:
        rank numbers. When one rank hangs, the others wait for it inside a collective; the one that is
        iterations behind, or fell silent first, comes first.
    """
    late = []
    for rank in range(ranks):
        beat = beats.get(rank)
        silent = silence_s[rank] if beat else elapsed_s
        if silent > patience.of(beat.phase if beat else "start"):
            late.append((beat.iteration if beat else -1, -silent, rank))
    return [rank for _, _, rank in sorted(late)]


class Watch:
    """Follows the beats of a run over time by a monotonic clock."""

    def __init__(self, run: Run, ranks: int, patience: Patience, clock: Callable[[], float] = time.monotonic):
        self._run, self._ranks, self._patience, self._clock = run, ranks, patience, clock
        self._began = clock()
        self._seen: dict[int, tuple[Beat, float]] = {}

    def look(self) -> list[int]:
        """Read the beats once; returns the overdue ranks as `overdue` does."""
        now = self._clock()
        for rank, beat in read_beats(self._run).items():
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = (beat, now)
        return overdue(
            {rank: beat for rank, (beat, _) in self._seen.items()},
            {rank: now - when for rank, (_, when) in self._seen.items()},
            self._ranks,
            now - self._began,
            self._patience,
        )

    def beat_of(self, rank: int) -> Beat | None:
        return self._seen[rank][0] if rank in self._seen else None


def watch_step(
    run: Run, ranks: int, patience: Patience, srun_pid: int, job_id: str, step_name: str, poll_s: float = 2.0
) -> int:
    """Guard one Slurm step until its srun ends; on a hang collect stacks, record the event, kill the step.

    Returns:
        0 when srun ended by itself, 1 when the step was killed here.
    """
    watch = Watch(run, ranks, patience)
    while _alive(srun_pid):
        late = watch.look()
        if late:
            _end_hung_step(run, watch, late, job_id, step_name)
            return 1
        time.sleep(poll_s)
    return 0


def _end_hung_step(run: Run, watch: Watch, late: list[int], job_id: str, step_name: str) -> None:
    step = _step_id(job_id, step_name)
    subprocess.run(["scancel", f"--signal={STACK_SIGNAL.name}", step], check=False)
    time.sleep(3)  # time for every rank to write its stacks to the shared file system
    # A rank that is frozen (stopped, or stuck in the kernel) cannot even dump its stack: it is the culprit.
    late.sort(key=lambda rank: bool(last_stack(run, rank)))
    culprit = late[0]
    beat = watch.beat_of(culprit)
    where = f"rank {culprit}" + (f" on {beat.node}, iteration {beat.iteration}, {beat.phase}" if beat else "")
    # The culprit and one that waits for it; more ranks than these seldom tell more.
    stacks = {str(rank): last_stack(run, rank) or "(no stack: the process is frozen)" for rank in late[:2]}
    runlog.append_event(
        run,
        "hang",
        reason=f"{where} gives no sign of life",
        rank=culprit,
        node=beat.node if beat else None,
        iteration=beat.iteration if beat else None,
        overdue=late,
        stacks=stacks,
    )
    print(f"watchdog: {where} gives no sign of life; overdue ranks {late}; ending the step", file=sys.stderr)
    for rank, stack in stacks.items():
        print(f"stack of rank {rank}:\n{stack}", file=sys.stderr)
    subprocess.run(["scancel", "--signal=KILL", step], check=False)


def _step_id(job_id: str, step_name: str) -> str:
    listing = subprocess.run(
        ["squeue", "--steps", "-h", "-j", job_id, "-o", "%i %j"], text=True, capture_output=True, check=False
    ).stdout
    for line in listing.splitlines():
        step, _, name = line.partition(" ")
        if name.strip() == step_name:
            return step
    return job_id


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
