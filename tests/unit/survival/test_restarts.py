"""When a run finishes, retries, requeues and gives up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.survival.restarts import (
    Action,
    attempts,
    decide,
    failures_without_progress,
    first_failure,
    last_words,
)


def attempt(sealed: int | None = None) -> dict:
    return {"event": "attempt", "iteration": sealed}


def ended(reason: str) -> dict:
    return {"event": "exit", "reason": reason}


def verdict(events: list[dict], sealed=None, code=1, signalled=None, limit=3):
    return decide(events, sealed, code, signalled, limit)


def test_a_finished_run_is_finished_whatever_its_teardown_returned():
    assert verdict([attempt(), {"event": "finished"}], code=139).action is Action.FINISH


def test_finishing_in_an_earlier_attempt_does_not_count():
    assert verdict([attempt(), {"event": "finished"}, attempt(10)], 10).action is not Action.FINISH


@pytest.mark.parametrize(
    ("code", "signalled", "action", "reason"),
    [
        (1, None, Action.RETRY, "crash, exit code 1"),
        (0, None, Action.REQUEUE, "stopped by signal"),
        (0, "time limit", Action.REQUEUE, "time limit"),
        (137, "terminated", Action.REQUEUE, "terminated"),
    ],
)
def test_each_end_has_its_action(code, signalled, action, reason):
    found = verdict([attempt()], code=code, signalled=signalled)
    assert (found.action, found.reason) == (action, reason)


def test_a_hang_is_retried_in_place_and_named():
    found = verdict([attempt(), {"event": "hang", "rank": 3, "node": "n7"}], code=137)
    assert (found.action, found.reason) == (Action.RETRY, "hang of rank 3 on n7")


def test_a_crash_loop_stops_and_lists_its_causes():
    events = [attempt(), ended("crash, exit code 1"), attempt(10), attempt(10)]
    found = verdict(events, 10, limit=2)
    assert found.action is Action.STOP
    assert "2 attempts without a newer checkpoint (node lost or job killed; crash, exit code 1)" in found.summary
    assert "newest checkpoint: 10" in found.summary


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["crash", "terminated", "time limit"])), max_size=12))
def test_only_blamed_attempts_since_the_last_progress_count(steps):
    events, sealed = [], 0
    for progressed, reason in steps:
        events += [attempt(sealed), ended(reason)]
        sealed += progressed
    expected = []
    for progressed, reason in steps:
        expected = [] if progressed else expected + [reason] * (reason != "terminated")
    assert [attempt.reason for attempt in failures_without_progress(attempts(events, sealed))] == expected


def test_blameless_attempts_are_no_causes_of_a_crash_loop():
    events = [attempt(), ended("crash, exit code 1"), attempt(), ended("terminated"), attempt()]
    found = verdict(events, limit=2)
    assert "2 attempts without a newer checkpoint (crash, exit code 1; crash, exit code 1)" in found.summary


@pytest.mark.parametrize("cause", ["Terminated", "Hangup"])
def test_a_signal_while_ranks_start_is_nobodys_fault(cause):
    # Before training begins a rank has nothing to save: the signal ends it as it would any program.
    failure = {"rank": 0, "node": "n1", "cause": cause}
    found = decide([attempt()], None, 143, None, 1, failure)
    assert (found.action, found.reason) == (Action.REQUEUE, "stopped by signal")
    killed = decide([attempt()], None, 137, None, 2, failure | {"cause": "Killed"})
    assert (killed.action, killed.reason) == (Action.RETRY, "crash, exit code 137, rank 0 on n1: Killed")


ERRORS = """note
error: /data/nope.yaml does not exist; build it
srun: error: n1: task 0: Exited with exit code 2
slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED ***
srun: error: n2: task 1: Terminated
"""


def test_a_refused_command_is_not_tried_again():
    # The ranks that srun ends because of the first raise its own code above 2.
    found = decide([attempt()], None, 143, None, 3, first_failure(ERRORS), last_words(ERRORS))
    assert found.action is Action.STOP
    assert found.reason == "the command is refused: /data/nope.yaml does not exist; build it"
    assert found.summary.endswith("newest checkpoint: none; correct it and submit again")


def test_the_last_words_are_never_slurms():
    assert last_words("usage: train [-h]\ntrain: error: unrecognized\nsrun: error: x\n") == "train: error: unrecognized"
    assert last_words("python: can't open file 'x.py'\nsrun: error: n1: task 0: Exited with exit code 2") == (
        "python: can't open file 'x.py'"
    )
    cancelled = "train: error: unrecognized\nslurmstepd-n1: error: *** STEP 12.1 ON n1 CANCELLED ***\n"
    assert last_words(cancelled) == "train: error: unrecognized"
    assert last_words("srun: error: x\n") == ""


def test_the_code_is_that_of_the_rank_that_failed_first():
    # srun reports the highest of all codes, such as 143 of the ranks that it ended itself.
    failure = {"rank": 1, "node": "n2", "cause": "Exited with exit code 3"}
    found = decide([attempt()], None, 143, None, 3, failure)
    assert found.reason == "last save failed, exit code 3, rank 1 on n2: Exited with exit code 3"


def test_a_failed_last_save_is_tried_again_and_counts():
    failure = {"rank": 0, "node": "n1", "cause": "Exited with exit code 3"}
    found = decide([attempt(8)], 8, 3, None, 2, failure)
    assert (found.action, found.reason) == (
        Action.RETRY,
        "last save failed, exit code 3, rank 0 on n1: Exited with exit code 3",
    )
    events = [attempt(8), ended(found.reason), attempt(8)]
    assert decide(events, 8, 3, None, 2, failure).action is Action.STOP


def test_trainings_own_exit_is_not_the_launchers():
    (found,) = attempts([attempt(), {"event": "exit", "code": 0}], None)
    assert found.reason == "node lost or job killed"


def test_the_first_task_that_srun_reports_is_the_culprit():
    text = "noise\nsrun: error: n2: task 1: Killed\nsrun: error: n1: tasks 0,2-3: Terminated\n"
    assert first_failure(text) == {"rank": 1, "node": "n2", "cause": "Killed"}
    assert first_failure("srun: error: n1: tasks 4-7: Exited with exit code 1")["rank"] == 4
    assert first_failure("all went well") == {}
