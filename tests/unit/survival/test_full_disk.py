"""Whatever a run writes beside its checkpoints is lost on a full disk, counted and said, and the run goes on."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.heartbeat import read_beats, start_heartbeat
from megatron_anyexperts.survival.lost_writes import LostWrites
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training.step_stats import SampleLog, forget_after, read_sample_log
from tests.full_disk import fill, small_disk


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20) as folder:
        yield folder


def test_logs_and_heartbeat_lose_what_does_not_fit_and_go_on(disk, capfd, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    run = Run(disk).create()
    samples = SampleLog(run.samples, 0)
    samples.add([["a"]])
    samples.flush(1)
    ballast = fill(disk)
    heartbeat = start_heartbeat(run, 0)
    keys = [["k" * 100] * 100]
    for iteration in range(2, 14):
        samples.add(keys)
        samples.flush(iteration)
        runlog.append_metrics(run, iteration, loss=1.0)
    try:
        raise RuntimeError("told although its stack cannot be written")
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    said = capfd.readouterr().err
    assert "heartbeat of rank 0: 1 write(s) lost, training goes on" in said
    assert "told although" in said
    for log in (run.samples / "rank0000.jsonl", run.metrics):
        assert [line.split()[2] for line in said.splitlines() if f"{log}:" in line] == ["1", "10"]
    ballast.unlink()
    samples.add([["b"]])
    samples.flush(14)
    runlog.append_metrics(run, 14, loss=2.0)
    heartbeat.beat(14)
    said = capfd.readouterr().err
    assert said.count("writes again, after 12 lost write(s)") >= 1
    assert read_beats(run)[0].iteration == 14
    assert [record["iteration"] for record in runlog.read_metrics(run)] == [14]
    assert read_sample_log(run.samples) == {1: ["a"], 14: ["b"]}


def test_a_sample_log_that_cannot_be_replaced_keeps_the_run_startable(disk, capfd):
    log = SampleLog(disk, 0)
    for iteration in (1, 2, 3):
        log.add([["k" * 5000]])
        log.flush(iteration)
    ballast = fill(disk)
    forget_after(disk, 2)
    assert "keeps lines of steps that are trained again" in capfd.readouterr().err
    ballast.unlink()
    forget_after(disk, 2)
    assert list(read_sample_log(disk)) == [1, 2]


def test_curves_go_on_in_a_new_file_when_there_is_room_again(disk, capfd, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from megatron_anyexperts.training import curves

    monkeypatch.setattr(curves, "_RETRY_S", 0.0)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    writer = curves.Curves(str(disk / "tensorboard"), 10)
    writer.add_scalar("loss", 1.0, 1)
    writer.flush()
    ballast = fill(disk)
    for iteration in range(2, 30):
        writer.add_histogram("importance", np.arange(1000), iteration)
        writer.flush()
    assert "TensorBoard" in capfd.readouterr().err
    ballast.unlink()
    writer.add_scalar("loss", 2.0, 30)
    writer.flush()
    assert "writes again" in capfd.readouterr().err
    read = EventAccumulator(str(disk / "tensorboard")).Reload()
    assert [event.step for event in read.Scalars("loss/all")] == [1, 30]


PRINTS = """
import sys
from megatron_anyexperts.survival.lost_writes import tolerate_full_disk
tolerate_full_disk()
for number in range(20000):
    print("x" * 100, flush=number % 2)
print("reached the end", file=sys.stderr)
"""


def test_printing_to_a_full_disk_ends_nothing():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", PRINTS], stdout=full, stderr=subprocess.PIPE, text=True)
        silent = subprocess.run([sys.executable, "-c", PRINTS], stdout=full, stderr=full)
    assert (done.returncode, silent.returncode) == (0, 0)
    assert "reached the end" in done.stderr
    assert "standard output: 1 write(s) lost, training goes on: [Errno 28] No space left on device" in done.stderr


def test_losses_are_said_at_each_tenfold_and_when_they_end(capsys):
    losses = LostWrites("log")
    for _ in range(2):
        for _ in range(250):
            losses.lost(OSError("full"))
        assert losses.count == 250
        losses.wrote()
        losses.wrote()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 * 4
    assert lines[3] == "WARNING: log: writes again, after 250 lost write(s)"
