"""What to do when a training step has ended: finish, try again, requeue, or give up."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]

# Reasons for which the attempt is not to blame; they never count towards a crash loop.
_BLAMELESS = ("terminated", "stopped by signal")
LOST = "node lost or job killed"
_SRUN_TASK = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<ranks>[\d,-]+): (?P<what>.+)")


class Action(enum.Enum):
    """What the batch script does next."""

    FINISH = "finish"
    RETRY = "retry"
    """Start again inside this allocation: nothing was wrong with the nodes as far as Slurm knows."""
    REQUEUE = "requeue"
    STOP = "stop"


@dataclass(frozen=True)
class Verdict:
    """The action, why the attempt ended, and the sentence to log."""

    action: Action
    reason: str
    summary: str


@dataclass(frozen=True)
class Attempt:
    """One start of training: the sealed checkpoint it began with and ended with, and why it ended."""

    began_with: int
    ended_with: int
    reason: str

    @property
    def progressed(self) -> bool:
        return self.ended_with > self.began_with


def attempts(events: Sequence[Event], sealed_now: int | None) -> list[Attempt]:
    """Attempts of a run and what became of each, oldest first.

    Args:
        events: of the run, oldest first; "attempt" carries `iteration`, the newest sealed checkpoint at that time.
        sealed_now: the newest sealed checkpoint, None before the first.
    """
    marks = [index for index, event in enumerate(events) if event.get("event") == "attempt"]
    found = []
    for position, mark in enumerate(marks):
        following = marks[position + 1] if position + 1 < len(marks) else None
        until = events[following] if following is not None else {"iteration": sealed_now}
        # Training logs its own exit as well; only the launcher knows the reason.
        exits = [event for event in events[mark:following] if event.get("event") == "exit" and "reason" in event]
        found.append(
            Attempt(
                events[mark].get("iteration") or 0, until.get("iteration") or 0, exits[-1]["reason"] if exits else LOST
            )
        )
    return found


def failures_without_progress(history: Sequence[Attempt]) -> int:
    """How many attempts at the end of `history` failed in a row without leaving a newer checkpoint."""
    count = 0
    for attempt in reversed(history):
        if attempt.progressed:
            break
        count += attempt.reason not in _BLAMELESS
    return count


def decide(
    events: Sequence[Event],
    sealed_now: int | None,
    exit_code: int,
    signalled: str | None,
    max_failures: int,
    failure: Event | None = None,
) -> Verdict:
    """Judge the attempt that just ended. Its "exit" event must not be among `events` yet.

    Args:
        events: of the run, oldest first, up to and including those of this attempt.
        sealed_now: the newest sealed checkpoint, None before the first.
        exit_code: of srun.
        signalled: why the batch script asked the ranks to stop ("time limit", "terminated"), None if it did not.
        max_failures: failed attempts in a row without a newer checkpoint after which to give up.
        failure: what `first_failure` found, when it found something.
    """
    last_attempt = max((index for index, event in enumerate(events) if event.get("event") == "attempt"), default=0)
    this_attempt = events[last_attempt:]
    if any(event.get("event") == "finished" for event in this_attempt):
        # Whatever happens while processes tear down after that cannot take the result away.
        return Verdict(Action.FINISH, "finished", f"training finished (srun exit code {exit_code})")
    hang = next((event for event in this_attempt if event.get("event") == "hang"), None)
    if hang:
        reason = f"hang of rank {hang.get('rank')} on {hang.get('node')}"
    elif signalled:
        reason = signalled
    elif exit_code == 0:
        reason = "stopped by signal"
    else:
        reason = f"crash, exit code {exit_code}"
        if failure:
            reason += f", rank {failure['rank']} on {failure['node']}: {failure['cause']}"
    history = attempts([*events, {"event": "exit", "reason": reason}], sealed_now)
    failures = failures_without_progress(history)
    at = f"newest checkpoint: {sealed_now if sealed_now is not None else 'none'}"
    if failures >= max_failures:
        causes = "; ".join(attempt.reason for attempt in history[-failures:])
        return Verdict(
            Action.STOP,
            reason,
            f"crash loop: {failures} attempts without a newer checkpoint ({causes}); "
            f"{at}; fix the cause and submit again",
        )
    action = Action.REQUEUE if signalled or (exit_code == 0 and not hang) else Action.RETRY
    return Verdict(action, reason, f"{reason}; {at}; {action.value}")


def first_failure(srun_errors: str) -> dict[str, Any]:
    """Rank, node and cause of the task that failed first, from what srun printed; empty when it says nothing.

    The tasks that srun ends because of it come later in its output.
    """
    for line in srun_errors.splitlines():
        match = _SRUN_TASK.search(line)
        if match:
            return {"rank": int(re.split("[,-]", match["ranks"])[0]), "node": match["node"], "cause": match["what"]}
    return {}
