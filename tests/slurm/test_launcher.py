"""The launcher on a real Slurm, with a program of seconds in place of training."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = {"ENTRY": "tests/slurm/counting_run.py"}
ITERATIONS = 40


@pytest.fixture
def counting(submitted):
    submitted.settings = dict(PROGRAM)
    return submitted


def expected_losses(iterations: int = ITERATIONS) -> dict[int, dict[str, float]]:
    state, losses = 0.0, {}
    for iteration in range(1, iterations + 1):
        state = (state * 31 + sum(key**2 for key in range((iteration - 1) * 4, iteration * 4))) % 1000003
        losses[iteration] = {"loss_count": state}
    return losses


def assert_nothing_lost(counting, iterations: int = ITERATIONS) -> None:
    assert counting.losses() == expected_losses(iterations)
    keys = counting.sample_keys()
    assert [key for iteration in sorted(keys) for key in keys[iteration]] == list(range(4 * iterations))


def test_two_nodes_run_to_the_end_after_a_full_preflight(counting):
    counting.submit("--train-iters", ITERATIONS, NODES=2, PREFLIGHT="full")
    counting.await_end(60)
    assert_nothing_lost(counting)
    assert "all-reduce between 2 nodes at" in counting.log()
    assert [event["nodes"] for event in counting.events("attempt")] == [["n1", "n2"]]


def test_a_killed_rank_is_named_and_the_run_continues_from_its_checkpoint(counting):
    counting.submit("--train-iters", ITERATIONS, NODES=2)
    counting.await_iteration(15, 40)
    started = time.monotonic()
    os.kill(counting.cluster.pid(counting.job, 1, "counting_run"), signal.SIGKILL)
    exit_event = counting.await_event("exit", 20)
    assert time.monotonic() - started < 15
    assert (exit_event["rank"], exit_event["node"]) == (1, "n2")
    counting.await_end(60)
    assert [event["iteration"] for event in counting.events("attempt")] == [None, 10]
    assert_nothing_lost(counting)


def test_the_time_limit_saves_requeues_and_resumes(counting):
    # Slurm counts the limit in minutes and may signal early, so how many restarts it takes is not fixed.
    counting.submit(
        "--train-iters", 60, "--step-seconds", 0.8, "--save-interval", 1000, NODES=2, TIME=1, SIGNAL_LEAD_S=30
    )
    counting.await_end(180)
    *interrupted, last = counting.events("exit")
    assert {event["reason"] for event in interrupted} == {"time limit"}
    assert last["reason"] == "finished"
    assert [event["restart"] for event in counting.events("attempt")] == list(range(1 + len(interrupted)))
    assert "SLURM_RESTART_COUNT=1, reason: time limit" in counting.log()
    assert_nothing_lost(counting, 60)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--signal=TERM",), "stopped by signal"),
        (("--batch", "--signal=TERM"), "terminated"),
    ],
)
def test_scancel_with_a_signal_saves_requeues_and_resumes(counting, words, reason):
    counting.submit("--train-iters", ITERATIONS, "--step-seconds", 0.1, "--save-interval", 1000, NODES=2)
    counting.await_iteration(5, 40)
    counting.cluster.command("scancel", *words, counting.job)
    assert counting.await_event("exit", 20)["reason"] == reason
    assert counting.await_end(60)["Restarts"] == "1"
    resumed = counting.events("attempt")[1]
    assert resumed["reason"] == reason
    assert resumed["iteration"] >= 5
    assert_nothing_lost(counting)


def test_a_job_cancelled_by_its_owner_stays_cancelled(counting):
    counting.submit("--train-iters", 1000, NODES=2)
    counting.await_iteration(5, 40)
    counting.cluster.command("scancel", counting.job)
    counting.await_end(40, state="CANCELLED")
    time.sleep(8)  # longer than a requeued job has to wait
    assert counting.cluster.job(counting.job)["JobState"] == "CANCELLED"


def test_a_frozen_rank_is_found_by_its_silence_and_named(counting):
    counting.submit("--train-iters", ITERATIONS, "--stall-at", 15, NODES=2, HANG_S=5, START_S=60)
    hang = counting.await_event("hang", 60)
    assert (hang["rank"], hang["node"]) == (1, "n2")
    assert 10 < hang["iteration"] <= 15  # beats are at least a second apart
    counting.await_end(60)
    assert counting.events("exit")[0]["reason"] == "hang of rank 1 on n2"
    assert "frozen" in hang["stacks"]["1"]
    assert "all_reduce" in hang["stacks"]["0"]
    assert_nothing_lost(counting)


def test_a_crash_loop_stops_with_a_summary(counting):
    counting.submit("--train-iters", ITERATIONS, "--fail-at", 15, NODES=2, MAX_FAILURES=2)
    counting.await_end(90, state="FAILED")
    assert len(counting.events("attempt")) == 3  # the first attempt made progress: it left a checkpoint
    summary = counting.events("stop")[-1]["summary"]
    assert summary.startswith("crash loop: 2 attempts without a newer checkpoint")
    assert "deliberate failure" in counting.events("exit")[-1]["stack"]
    status = counting.cluster.command("slurm/status", str(counting.run.root))
    assert "stopped: crash loop" in status


def test_signals_while_ranks_start_are_no_failures(counting):
    counting.submit("--train-iters", 5, "--start-seconds", 4, NODES=2, MAX_FAILURES=1)
    for start in range(2):
        counting.cluster.wait(lambda start=start: len(counting.events("attempt")) == start + 1, 40, "no start")
        counting.cluster.wait(
            lambda: all((counting.run.heartbeats / f"rank000{rank}.json").exists() for rank in (0, 1)), 20, "no rank"
        )
        counting.cluster.command("scancel", "--signal=TERM", counting.job)
        counting.cluster.wait(lambda start=start: len(counting.events("exit")) == start + 1, 20, "no end", counting.log)
    counting.await_end(60)
    assert [event["reason"] for event in counting.events("exit")] == ["stopped by signal"] * 2 + ["finished"]
    assert not counting.events("stop")


def test_a_refused_command_is_tried_once_and_says_why(counting):
    counting.submit("--train-itres", 5, NODES=2)
    counting.await_end(40, state="FAILED")
    assert len(counting.events("attempt")) == 1
    (stop,) = counting.events("stop")
    assert "the command is refused: counting_run.py: error: " in stop["summary"]
    assert "--train-iters" in stop["summary"]
    status = counting.cluster.command("slurm/status", str(counting.run.root))
    assert "state         stopped: the command is refused: counting_run.py: error:" in status


def test_without_a_log_of_attempts_a_crash_is_not_repeated(counting):
    counting.run.create().events.mkdir()  # root may write to any file, but not to a folder
    counting.submit("--train-iters", ITERATIONS, "--fail-at", 5)
    counting.await_end(40, state="FAILED")
    log = counting.log_of_job()
    assert log.count("attempt: SLURM_RESTART_COUNT") == 1
    assert "events.jsonl cannot be written, so restarts cannot be counted; submit again" in log


@pytest.mark.parametrize("words", [("scontrol", "requeue"), ("scancel", "--batch", "--signal=TERM")])
def test_a_preflight_that_is_interrupted_blames_no_node(counting, words):
    # On n2 Python needs seconds to start, so the preflight can be caught.
    plugin = counting.run.root.parent / "slow"
    plugin.mkdir()
    (plugin / "sitecustomize.py").write_text(
        "import os, sys, time\nif 'probe' in sys.argv[-4:] or os.environ.get('SLURM_STEP_ID') == '0': time.sleep(6)\n"
    )
    counting.cluster.set_task_environment("n2", PYTHONPATH=str(plugin))
    counting.submit("--train-iters", 5, NODES=2)
    counting.await_event("attempt", 30)
    time.sleep(2)
    counting.cluster.command(*words, counting.job)
    counting.cluster.wait(lambda: len(counting.events("attempt")) == 2, 60, "no second start", counting.log)
    counting.await_end(60)
    assert not counting.events("preflight")
    assert "nodes are fit" not in counting.log()
    assert len(counting.losses()) == 5


def test_a_batch_script_that_fails_leaves_its_cause(counting):
    counting.submit("--train-iters", 5, SBATCH_EXTRA="--begin=now+3")
    (counting.run.logs / f"step-{counting.job}.err").mkdir(exist_ok=True)  # where the launcher keeps what srun prints
    counting.await_end(40, state="FAILED")
    assert "the batch script ended with exit code" in counting.events("stop")[-1]["summary"]


def test_a_profile_that_is_spoilt_in_the_queue_leaves_its_trace(counting, tmp_path):
    profile = tmp_path / "own.env"
    profile.write_text((ROOT / "slurm" / "profiles" / "cpu.env").read_text())
    counting.submit("--train-iters", 5, PROFILE=profile, SBATCH_EXTRA="--begin=now+3")
    profile.write_text("HANGS_S=5\n")
    counting.await_end(40, state="FAILED")
    assert "exit code 2; the end of its log says why" in counting.events("stop")[-1]["summary"]
    assert f"unknown setting HANGS_S in {profile}; did you mean HANG_S?" in counting.log_of_job()


def test_a_lost_node_leaves_a_smaller_run_that_grows_again(counting):
    counting.submit("--train-iters", 200, "--step-seconds", 0.1, NODES="1-2")
    counting.await_iteration(15, 40)
    counting.cluster.lose_node("n2")
    counting.cluster.wait(lambda: len(counting.events("attempt")) == 2, 40, "no restart", counting.log)
    assert counting.events("attempt")[1]["nodes"] == ["n1"]
    assert counting.events("attempt")[1]["reason"] == "node lost or job killed"
    reached = max(counting.losses())
    counting.await_iteration(reached + 10, 40)
    counting.cluster.return_node("n2")
    counting.cluster.command("scancel", "--batch", "--signal=TERM", counting.job)
    counting.await_end(90)
    assert counting.events("attempt")[2]["nodes"] == ["n1", "n2"]
    assert_nothing_lost(counting, 200)


def test_two_jobs_share_a_node(cluster, tmp_path, submitted):
    runs = [submitted, type(submitted)(cluster, type(submitted.run)(tmp_path / "other"))]
    for run in runs:
        run.settings = PROGRAM | {"SBATCH_EXTRA": "--nodelist=n1"}
        run.submit("--train-iters", 60, "--step-seconds", 0.1, RANKS_PER_NODE=2)
    for run in runs:
        run.await_end(60)
        assert_nothing_lost(run, 60)
    (first_start, first_end), (second_start, second_end) = (
        [run.events(name)[0]["time"] for name in ("attempt", "exit")] for run in runs
    )
    assert max(first_start, second_start) < min(first_end, second_end)


def test_a_second_job_of_the_same_run_waits_for_the_first(counting):
    first = counting.submit("--train-iters", ITERATIONS)
    second = counting.submit("--train-iters", ITERATIONS)
    counting.cluster.await_state(first, "RUNNING", timeout=20)
    assert counting.cluster.job(second)["Reason"] == "Dependency"
