"""One training at a time in a run: a living holder is named, a dead one's lock is taken over, by one of many."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.survival import lock as locks
from megatron_anyexperts.survival.lock import STALE_S, Holder, RunInUse, RunLock, why_stale
from megatron_anyexperts.survival.run_directory import Run

HOLD = """
import sys, time
from pathlib import Path
from megatron_anyexperts.survival.lock import RunInUse, RunLock
from megatron_anyexperts.survival.run_directory import Run
print("ready", flush=True)
sys.stdin.readline()
try:
    print("held " + RunLock(Run(Path(sys.argv[1]))).acquire(), flush=True)
    time.sleep(600)
except RunInUse as error:
    print("refused", flush=True)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return Run(tmp_path).create()


@pytest.fixture
def start(run):
    processes = []

    def go() -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(run.root)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield go
    for process in processes:
        process.kill()
        process.wait()


def answer(process: subprocess.Popen) -> str:
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_a_second_training_is_refused_by_name_until_the_first_is_dead(run, start):
    holder = start()
    assert answer(holder) == "held"
    with pytest.raises(RunInUse, match=f"in use by process {holder.pid} on .*use another --run-dir"):
        RunLock(run).acquire()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    mine = RunLock(run)
    assert f"lock of process {holder.pid} on " in (said := mine.acquire())
    assert said.endswith("taken over: its process has ended")
    mine.release()
    assert sorted(path.name for path in run.root.iterdir()) == ["checkpoints", "logs"]


def test_of_many_that_take_over_a_stale_lock_one_succeeds(run, start):
    for _ in range(5):
        run.lock.write_text(json.dumps(asdict(replace(Holder.myself(), pid=2**22 - 1, started="1"))))
        rivals = [start() for _ in range(6)]
        for rival in rivals:
            rival.stdin.write("\n")
            rival.stdin.flush()
        answers = [rival.stdout.readline().strip() for rival in rivals]
        assert sorted(each.split()[0] for each in answers) == ["held"] + ["refused"] * 5, answers
        for rival in rivals:
            rival.kill()
            rival.wait()


def elsewhere(run: Run, silent_s: float, **fields: str) -> Holder:
    holder = replace(Holder.myself(), host="n7", boot="another kernel", token="theirs", **fields)
    run.lock.write_text(json.dumps(asdict(holder)))
    os.utime(run.lock, (time.time() - silent_s, time.time() - silent_s))
    return holder


def test_a_holder_on_another_host_counts_as_dead_after_the_stated_silence(run):
    elsewhere(run, STALE_S / 2)
    with pytest.raises(RunInUse, match="on n7, last sign of life 90 s ago"):
        RunLock(run).acquire()
    elsewhere(run, STALE_S + 5)
    lock = RunLock(run)
    assert "no sign of life for 185 s" in lock.acquire()
    lock.release()


def test_a_requeued_job_takes_over_from_its_earlier_start_at_once(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    elsewhere(run, 1)
    assert "an earlier start of the same Slurm job" in RunLock(run).acquire()


def test_a_beating_holder_stays_and_one_that_was_taken_over_knows_it(run, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_S", 0.01)
    lock = RunLock(run)
    lock.acquire()
    os.utime(run.lock, (0, 0))
    deadline = time.monotonic() + 20
    while run.lock.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert run.lock.stat().st_mtime > 0
    assert lock.held()
    elsewhere(run, 0)
    assert not lock.held()
    lock.release()
    assert run.lock.exists(), "it is theirs now"


def test_without_hard_links_the_lock_still_has_one_holder(run, monkeypatch):
    def no_links(*_: object) -> None:
        raise OSError(locks.errno.EOPNOTSUPP, "no links here")

    monkeypatch.setattr(locks.os, "link", no_links)
    first = RunLock(run)
    assert first.acquire() == ""
    with pytest.raises(RunInUse):
        RunLock(run).acquire()
    first.release()


@given(st.booleans(), st.booleans(), st.booleans(), st.floats(0, 10 * STALE_S))
def test_a_holder_is_judged_by_its_process_where_that_can_be_seen_and_by_its_silence_elsewhere(
    same_host, alive, same_job, silent_s
):
    me = Holder("n1", "b1", 1, "10", "5", "me")
    holder = Holder("n1", "b1" if same_host else "b2", 2, "20", "5" if same_job else "6", "them")
    stale = bool(why_stale(holder, me, silent_s, "20" if alive else "21"))
    assert stale == (not alive if same_host else same_job or silent_s > STALE_S)
