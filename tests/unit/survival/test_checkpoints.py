"""Sealing, verification, fallback, retention and disk room, on real files."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.survival import checkpoints
from megatron_anyexperts.survival.manifest import (
    MANIFEST,
    TRACKER,
    digest,
    iteration_directory,
    payload_files,
    saved_iterations,
    seal,
    verify,
)


def write(save_dir: Path, iteration: int, sealed: bool = True) -> Path:
    folder = iteration_directory(save_dir, iteration)
    (folder / "nested").mkdir(parents=True)
    for index, name in enumerate((".metadata", "__0_0.distcp", "nested/__1_0.distcp")):
        (folder / name).write_bytes(random.Random(f"{iteration}{index}").randbytes(1000 + index))
    if sealed:
        seal(folder)
    return folder


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [(truncate, "bytes, not"), (flip_a_byte, "other content"), (Path.unlink, "is missing")],
)
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "nested/__1_0.distcp"])
def test_any_damage_to_any_file_is_found(tmp_path, damage, problem, name):
    folder = write(tmp_path, 10)
    assert verify(folder) == []
    damage(folder / name)
    (found,) = verify(folder)
    assert name in found
    assert problem in found


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {"a": 1}}', '{"files": {"a": {"bytes": "x"}}}'])
def test_a_damaged_manifest_is_a_problem_not_an_error(tmp_path, content):
    folder = write(tmp_path, 10)
    (folder / MANIFEST).write_text(content)
    assert "manifest is unreadable" in verify(folder)[0]


def test_ranks_may_share_the_hashing(tmp_path):
    folder = write(tmp_path, 10, sealed=False)
    names = payload_files(folder)
    seal(folder, digest(folder, names[0::2]) | digest(folder, names[1::2]))
    assert verify(folder) == []


def test_sealing_refuses_a_partial_list_and_an_empty_directory(tmp_path):
    folder = write(tmp_path, 10, sealed=False)
    with pytest.raises(ValueError, match="do not match the files"):
        seal(folder, digest(folder, payload_files(folder)[:1]))
    with pytest.raises(FileNotFoundError, match="save before sealing"):
        seal(tmp_path / "iter_0000020")


def test_resume_skips_damaged_and_unfinished_checkpoints_and_says_why(tmp_path):
    write(tmp_path, 10)
    truncate(write(tmp_path, 20) / "__0_0.distcp")
    write(tmp_path, 30, sealed=False)
    selection = checkpoints.prepare_resume(tmp_path)
    assert selection.iteration == 10
    assert [iteration for iteration, _ in selection.skipped] == [30, 20]
    assert "iteration 30 skipped: it was never sealed" in str(selection)
    assert (tmp_path / TRACKER).read_text() == "10"
    assert saved_iterations(tmp_path) == [10]
    assert (tmp_path / "damaged-iter_0000020").is_dir()


def test_a_run_with_only_damaged_checkpoints_does_not_silently_start_over(tmp_path):
    flip_a_byte(write(tmp_path, 10) / "__0_0.distcp")
    with pytest.raises(checkpoints.NoUsableCheckpoint, match="iteration 10 skipped"):
        checkpoints.prepare_resume(tmp_path)
    assert saved_iterations(tmp_path) == [10]


def test_a_first_save_that_never_finished_means_starting_from_scratch(tmp_path):
    write(tmp_path, 10, sealed=False)
    (tmp_path / TRACKER).write_text("10")
    assert checkpoints.prepare_resume(tmp_path).iteration is None
    assert not (tmp_path / TRACKER).exists()


def test_the_tracker_names_sealed_checkpoints_only(tmp_path):
    write(tmp_path, 10, sealed=False)
    with pytest.raises(FileNotFoundError, match="not sealed"):
        checkpoints.repoint_tracker(tmp_path, 10)


@given(st.sets(st.integers(1, 200)), st.integers(1, 6), st.integers(0, 50))
def test_retention_keeps_the_newest_and_the_milestones(iterations, keep_last, keep_every):
    doomed = checkpoints.expendable(iterations, keep_last, keep_every)
    kept = sorted(set(iterations) - set(doomed))
    assert set(doomed) <= iterations
    assert sorted(iterations)[-keep_last:] == kept[-keep_last:]
    milestones = {each for each in iterations if keep_every and each % keep_every == 0}
    assert set(kept) == milestones | set(sorted(iterations)[-keep_last:])


@pytest.mark.parametrize("wrong", [(0, 0), (1, -1)])
def test_retention_refuses_limits_that_keep_nothing(wrong):
    with pytest.raises(ValueError, match="keep_last"):
        checkpoints.expendable([1, 2], *wrong)


def test_prune_counts_sealed_ones_only_and_protects(tmp_path):
    for iteration in (10, 20, 30, 40):
        write(tmp_path, iteration)
    write(tmp_path, 50, sealed=False)
    (tmp_path / "deleting-iter_0000005").mkdir()
    assert checkpoints.prune(tmp_path, keep_last=1, keep_every=20, protect={10}) == [30]
    assert saved_iterations(tmp_path) == [10, 20, 40, 50]
    assert not list(tmp_path.glob("deleting-*"))


def test_room_is_judged_by_the_size_of_the_newest_sealed_checkpoint(tmp_path):
    assert checkpoints.room_for_save(tmp_path).needed == 0
    write(tmp_path, 10)
    room = checkpoints.room_for_save(tmp_path, margin=2)
    assert room.needed == 2 * (1000 + 1001 + 1002)
    assert room.enough == (shutil.disk_usage(tmp_path).free >= room.needed)
    assert not checkpoints.Room(free=1, needed=2).enough


def test_the_manifest_lists_sizes_and_hashes(tmp_path):
    files = json.loads((write(tmp_path, 10) / MANIFEST).read_text())["files"]
    assert {name: entry["bytes"] for name, entry in files.items()} == {
        ".metadata": 1000,
        "__0_0.distcp": 1001,
        "nested/__1_0.distcp": 1002,
    }
    assert all(len(entry["sha256"]) == 64 for entry in files.values())
