"""What to do when a training step has ended: finish, try again, requeue, or give up."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .exit_codes import ExitCode

Event = dict[str, Any]

STOPPED = "stopped by signal"
# Reasons for which the attempt is not to blame; they never count towards a crash loop.
_BLAMELESS = ("terminated", STOPPED)
# How srun reports a rank that such a signal ended while it could not yet save: before training begins.
_SIGNALLED_TASK = ("Terminated", "Hangup", "Interrupt")
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


def failures_without_progress(history: Sequence[Attempt]) -> list[Attempt]:
    """The attempts at the end of `history` that failed in a row without leaving a newer checkpoint, oldest first.

    Blameless ones are left out, and do not interrupt the row.
    """
    failed: list[Attempt] = []
    for attempt in reversed(history):
        if attempt.progressed:
            break
        if attempt.reason not in _BLAMELESS:
            failed.insert(0, attempt)
    return failed


def decide(
    events: Sequence[Event],
    sealed_now: int | None,
    exit_code: int,
    signalled: str | None,
    max_failures: int,
    failure: Event | None = None,
    refusal: str = "",
) -> Verdict:
    """Judge the attempt that just ended. Its "exit" event must not be among `events` yet.

    Args:
        events: of the run, oldest first, up to and including those of this attempt.
        sealed_now: the newest sealed checkpoint, None before the first.
        exit_code: of srun.
        signalled: why the batch script asked the ranks to stop ("time limit", "terminated"), None if it did not.
        max_failures: failed attempts in a row without a newer checkpoint after which to give up.
        failure: what `first_failure` found, when it found something.
        refusal: what the ranks said if they ended with `ExitCode.USAGE`; see `last_words`.
    """
    last_attempt = max((index for index, event in enumerate(events) if event.get("event") == "attempt"), default=0)
    this_attempt = events[last_attempt:]
    if any(event.get("event") == "finished" for event in this_attempt):
        # Whatever happens while processes tear down after that cannot take the result away.
        return Verdict(Action.FINISH, "finished", f"training finished (srun exit code {exit_code})")
    hang = next((event for event in this_attempt if event.get("event") == "hang"), None)
    at = f"newest checkpoint: {sealed_now if sealed_now is not None else 'none'}"
    if hang:
        reason = f"hang of rank {hang.get('rank')} on {hang.get('node')}"
    elif signalled:
        reason = signalled
    elif exit_code == 0 or (failure and failure["cause"] in _SIGNALLED_TASK):
        reason = STOPPED
    elif (code := _code(exit_code, failure)) == ExitCode.USAGE:
        reason = f"the command is refused: {refusal or 'it ended with exit code 2'}"
        return Verdict(Action.STOP, reason, f"{reason}; {at}; correct it and submit again")
    else:
        what = "last save failed" if code == ExitCode.NOT_SAVED else "crash"
        reason = f"{what}, exit code {code}"
        if failure:
            reason += f", rank {failure['rank']} on {failure['node']}: {failure['cause']}"
    failures = failures_without_progress(attempts([*events, {"event": "exit", "reason": reason}], sealed_now))
    if len(failures) >= max_failures:
        causes = "; ".join(attempt.reason for attempt in failures)
        return Verdict(
            Action.STOP,
            reason,
            f"crash loop: {len(failures)} attempts without a newer checkpoint ({causes}); "
            f"{at}; fix the cause and submit again",
        )
    action = Action.REQUEUE if not hang and (signalled or reason == STOPPED) else Action.RETRY
    return Verdict(action, reason, f"{reason}; {at}; {action.value}")


def _code(exit_code: int, failure: Event | None) -> int:
    # srun's own code is the highest of all ranks, and those it ended because of the first have higher ones.
    own = re.fullmatch(r"Exited with exit code (\d+)", failure["cause"]) if failure else None
    return int(own[1]) if own else exit_code


def last_words(step_errors: str) -> str:
    """The message with which the ranks ended: the last line that says "error:", else the last that is not Slurm's."""
    lines = [line.strip() for line in step_errors.splitlines()]
    lines = [line for line in lines if line and not re.match(r"(srun|slurmstepd)\S*:", line)]
    said = [line for line in lines if "error:" in line] or lines
    return said[-1].removeprefix("error: ")[:500] if said else ""


def first_failure(srun_errors: str) -> dict[str, Any]:
    """Rank, node and cause of the task that failed first, from what srun printed; empty when it says nothing.

    The tasks that srun ends because of it come later in its output.
    """
    for line in srun_errors.splitlines():
        match = _SRUN_TASK.search(line)
        if match:
            return {"rank": int(re.split("[,-]", match["ranks"])[0]), "node": match["node"], "cause": match["what"]}
    return {}
