"""A file system that errs at any moment of a save costs that save, not the run, and no older checkpoint."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_anyexperts.survival import checkpoints as files
from megatron_anyexperts.survival import manifest, retention, runlog
from megatron_anyexperts.survival.checkpoints import NotSaved
from megatron_anyexperts.survival.lock import Holder, RunLock
from megatron_anyexperts.survival.manifest import TRACKER, iteration_directory, saved_iterations
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training import checkpoints
from tests.full_disk import small_disk


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run").create()


@pytest.fixture
def save(world, run, monkeypatch):
    """`save(iteration)` in a run that keeps one checkpoint and has saved iterations 10 and 20."""
    monkeypatch.setattr(checkpoints, "get_args", lambda: SimpleNamespace(save=str(run.checkpoints), async_save=False))
    saver = checkpoints.Checkpoints(run, keep_last=1, keep_every=10)

    def write(iteration: int) -> None:
        folder = iteration_directory(run.checkpoints, iteration)
        (folder / "__0_0.distcp").write_bytes(bytes(1000))

    monkeypatch.setattr(saver, "_save", write)
    saver.save(10)
    saver.save(20)
    return saver.save


def erring(*_: object, **__: object) -> None:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def events(run: Run) -> list[tuple[str, int]]:
    return [(event["event"], event["iteration"]) for event in runlog.read_events(run)]


MOMENTS = {
    "the room is looked at": (retention.shutil, "disk_usage"),
    "the files are listed": (checkpoints, "file_sizes"),
    "they are hashed": (manifest, "_digest_file"),
    "they are sealed": (checkpoints, "seal"),
    "the tracker is replaced": (files, "repoint_tracker"),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("deletable", [True, False], ids=["", "and what was written cannot be deleted"])
def test_an_error_costs_the_save_alone(save, run, monkeypatch, moment, deletable):
    with monkeypatch.context() as fault:
        fault.setattr(*MOMENTS[moment], erring)
        if not deletable:
            fault.setattr(Path, "rename", erring)
        save(35)
    assert events(run)[2:] == [("save_failed", 35)]
    reason = runlog.read_events(run)[-1]["reason"]
    assert os.strerror(errno.ESTALE) in reason
    left = not deletable and moment != "the room is looked at"  # before anything is written
    assert ("not deleted" in reason) == left
    assert (run.checkpoints / TRACKER).read_text() == "20"
    assert saved_iterations(run.checkpoints) == [10, 20, 35][: 2 + left]
    assert not any(files.verify(iteration_directory(run.checkpoints, iteration)) for iteration in (10, 20))
    save(40)
    assert events(run)[3:] == [("saved", 40)]


def test_a_checkpoint_that_the_tracker_names_stays_although_flushing_the_tracker_fails(save, run, monkeypatch):
    repoint = files.repoint_tracker

    def replace_then_err(save_dir: Path, iteration: int) -> None:
        repoint(save_dir, iteration)
        erring()

    monkeypatch.setattr(files, "repoint_tracker", replace_then_err)
    save(35)
    assert events(run)[2:] == [("saved", 35)]
    assert files.select_resume(run.checkpoints).iteration == 35 == int((run.checkpoints / TRACKER).read_text())


def test_a_checkpoint_stays_although_deleting_an_older_one_fails(save, run, monkeypatch, capsys):
    save(35)
    with monkeypatch.context() as fault:
        fault.setattr(retention, "discard", erring)
        save(45)
    assert events(run)[3:] == [("saved", 45)]
    assert "older checkpoints not deleted" in capsys.readouterr().out
    assert files.select_resume(run.checkpoints).iteration == 45 == int((run.checkpoints / TRACKER).read_text())
    save(55)
    assert saved_iterations(run.checkpoints) == [10, 20, 55]


MIB = 1 << 20


@pytest.fixture
def on_small_disk(world, tmp_path, monkeypatch):
    """A run on a disk of 4 MiB; `saver.size` says how much the next checkpoint takes."""
    with small_disk(tmp_path / "disk", 4 * MIB) as disk:
        run = Run(disk).create()
        args = SimpleNamespace(save=str(run.checkpoints), async_save=False)
        monkeypatch.setattr(checkpoints, "get_args", lambda: args)
        saver = checkpoints.Checkpoints(run, keep_last=5, keep_every=0, max_failed=2)
        saver.size = MIB

        def write(iteration: int) -> None:
            (iteration_directory(run.checkpoints, iteration) / "__0_0.distcp").write_bytes(bytes(saver.size))

        monkeypatch.setattr(saver, "_save", write)
        yield saver


def test_older_checkpoints_make_room_before_a_save(on_small_disk):
    for iteration in (10, 20, 30, 40):
        on_small_disk.save(iteration)
    run = on_small_disk.run
    assert events(run) == [("saved", 10), ("saved", 20), ("saved", 30), ("room", 40), ("saved", 40)]
    assert files.select_resume(run.checkpoints).iteration == 40
    assert saved_iterations(run.checkpoints) == [20, 30, 40]


def test_older_checkpoints_make_room_when_the_disk_fills_up_during_a_save(on_small_disk):
    for iteration in (10, 20):
        on_small_disk.save(iteration)
    on_small_disk.size = 5 * MIB // 2
    on_small_disk.save(30)
    run = on_small_disk.run
    assert events(run)[2:] == [("room", 30), ("saved", 30)]
    assert saved_iterations(run.checkpoints) == [20, 30]


def test_a_run_whose_saves_keep_failing_stops_and_its_newest_checkpoint_stays(on_small_disk):
    on_small_disk.save(10)
    on_small_disk.size = 5 * MIB
    on_small_disk.save(20)
    with pytest.raises(NotSaved, match="--max-failed-saves 2: .*No space left"):
        on_small_disk.save(30)
    with pytest.raises(NotSaved, match="iteration 30 is in no checkpoint"):
        on_small_disk.refuse_unsaved()
    assert events(on_small_disk.run) == [("saved", 10), ("save_failed", 20), ("save_failed", 30)]
    assert files.select_resume(on_small_disk.run.checkpoints).iteration == 10


def test_a_good_save_forgets_the_failed_ones(save, run, monkeypatch):
    for iteration in (31, 41, 51):
        with monkeypatch.context() as fault:
            fault.setattr(checkpoints, "seal", erring)
            save(iteration)
        save(iteration + 1)
    save.__self__.refuse_unsaved()


def test_a_run_taken_over_by_another_training_writes_nothing_more(save, run):
    save.__self__.lock = RunLock(run)
    run.lock.write_text(json.dumps(asdict(Holder("n2", "b", 1, "2", "", "t"))))
    with pytest.raises(NotSaved, match="another training took"):
        save(30)
    assert saved_iterations(run.checkpoints) == [10, 20]
