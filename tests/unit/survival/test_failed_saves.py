"""A file system that errs at any moment of a save costs that save, not the run, and no older checkpoint."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_anyexperts.survival import checkpoints as files
from megatron_anyexperts.survival import manifest, runlog
from megatron_anyexperts.survival.manifest import TRACKER, iteration_directory, saved_iterations
from megatron_anyexperts.survival.run import Run
from megatron_anyexperts.training import checkpoints


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
        folder.mkdir(parents=True)
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
    "the room is looked at": (files.shutil, "disk_usage"),
    "the files are listed": (checkpoints, "payload_files"),
    "they are hashed": (manifest, "_digest_file"),
    "they are sealed": (files, "seal"),
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
        fault.setattr(files, "discard", erring)
        save(45)
    assert events(run)[3:] == [("saved", 45)]
    assert "older checkpoints not deleted" in capsys.readouterr().out
    assert files.select_resume(run.checkpoints).iteration == 45 == int((run.checkpoints / TRACKER).read_text())
    save(55)
    assert saved_iterations(run.checkpoints) == [10, 20, 55]
