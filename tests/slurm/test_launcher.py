"""The launcher on a real Slurm, with a program of seconds in place of training."""

from __future__ import annotations

import os
import signal
import time

import pytest

PROGRAM = {"ENTRY": "tests/slurm/counting_run.py"}
ITERATIONS = 40


@pytest.fixture
def counting(submitted):
    submitted.settings = dict(PROGRAM)
    return submitted


def expected_losses(iterations: int = ITERATIONS) -> dict[int, float]:
    state, losses = 0.0, {}
    for iteration in range(1, iterations + 1):
        state = (state * 31 + sum(key**2 for key in range((iteration - 1) * 4, iteration * 4))) % 1000003
        losses[iteration] = state
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
    os.kill(counting.cluster.pids(counting.job, rank=1)[-1], signal.SIGKILL)
    exit_event = counting.await_event("exit", 20)
    assert time.monotonic() - started < 15
    assert (exit_event["rank"], exit_event["node"]) == (1, "n2")
    counting.await_end(60)
    assert [event["iteration"] for event in counting.events("attempt")] == [None, 10]
    assert_nothing_lost(counting)
