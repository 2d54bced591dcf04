"""Silence of a rank is noticed by the watcher's own clock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.survival.heartbeat import Beat, clear, last_stack, read_beats, start_heartbeat
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.survival.watchdog import Patience, Watch, overdue

PATIENCE = Patience(train=60, start=600)
RANK = """
import pathlib, sys, time
from megatron_anyexperts.survival.heartbeat import start_heartbeat
from megatron_anyexperts.survival.run_directory import Run
heartbeat = start_heartbeat(Run(pathlib.Path(sys.argv[1])), 3)
heartbeat.beat(7)
print("ready", flush=True)
{}
"""


def beat(rank: int, iteration: int = 5, phase: str = "train") -> Beat:
    return Beat(rank, iteration, phase, "n1", 0.0)


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1000), st.sampled_from(["train", "save"])), min_size=1))
def test_exactly_the_silent_ranks_are_overdue_and_the_last_behind_comes_first(ranks):
    beats = {rank: beat(rank, iteration, phase) for rank, (iteration, _, phase) in enumerate(ranks)}
    silence = {rank: silent for rank, (_, silent, _) in enumerate(ranks)}
    late = overdue(beats, silence, len(ranks), 0, PATIENCE)
    assert set(late) == {rank for rank in beats if silence[rank] > (60 if beats[rank].phase == "train" else 600)}
    if late:
        assert beats[late[0]].iteration == min(beats[rank].iteration for rank in late)


def test_a_rank_that_never_beats_is_overdue_after_the_start():
    assert overdue({0: beat(0)}, {0: 1}, 2, 599, PATIENCE) == []
    assert overdue({0: beat(0)}, {0: 1}, 2, 601, PATIENCE) == [1]


def test_a_clock_that_is_wrong_on_the_node_does_not_matter(tmp_path, monkeypatch):
    run, now = Run(tmp_path), [1000.0]
    watch = Watch(run, 1, PATIENCE, clock=lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the node believes it is 1970
    start_heartbeat(run, 0).beat(1)
    assert watch.look() == []
    now[0] += 59
    assert watch.look() == []
    now[0] += 2
    assert watch.look() == [0]


def run_rank(tmp_path, body: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", RANK.format(body), tmp_path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"ready\n"
    return process


def test_a_rank_stuck_outside_python_still_leaves_its_stack(tmp_path):
    process = run_rank(tmp_path, "def stuck():\n    time.sleep(60)\nstuck()")
    assert read_beats(Run(tmp_path))[3].iteration == 7
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGUSR2)
    deadline = time.monotonic() + 10
    while "in stuck" not in last_stack(Run(tmp_path), 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert "in stuck" in last_stack(Run(tmp_path), 3)


def test_an_exception_and_a_segmentation_fault_leave_their_stacks(tmp_path):
    for body, expected in (
        ("raise KeyError('lost')", "KeyError: 'lost'"),
        ("import ctypes; ctypes.string_at(0)", "Segmentation fault"),
    ):
        clear(Run(tmp_path))
        assert last_stack(Run(tmp_path), 3) == ""
        run_rank(tmp_path, body).communicate()
        assert expected in last_stack(Run(tmp_path), 3)


def test_a_full_disk_does_not_end_the_rank(tmp_path, capsys):
    heartbeat = start_heartbeat(Run(tmp_path), 0)
    Run(tmp_path).heartbeats.joinpath("rank0000.json").unlink()
    Run(tmp_path).heartbeats.rmdir()
    heartbeat.beat(5)
    assert "heartbeat of rank 0: 1 write(s) lost" in capsys.readouterr().err
