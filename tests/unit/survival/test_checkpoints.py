"""Sealing, verification, fallback, retention and disk room, on real files."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.survival import checkpoints, retention
from megatron_anyexperts.survival.manifest import (
    MANIFEST,
    TRACKER,
    UNFINISHED,
    begin_save,
    digest,
    file_sizes,
    iteration_directory,
    payload_files,
    saved_iterations,
    seal,
    share_files,
    verify,
)


def write(save_dir: Path, iteration: int, sealed: bool = True) -> Path:
    folder = iteration_directory(save_dir, iteration)
    begin_save(folder)
    (folder / "nested").mkdir()
    for index, name in enumerate((".metadata", "__0_0.distcp", "nested/__1_0.distcp")):
        (folder / name).write_bytes(random.Random(f"{iteration}{index}").randbytes(1000 + index))
    if sealed:
        seal(folder)
    return folder


def main_of_survival(*words: object) -> int:
    command = [sys.executable, "-m", "megatron_anyexperts.survival", *map(str, words)]
    return subprocess.run(command, check=False).returncode


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


def test_a_manifest_without_files_vouches_for_nothing(tmp_path):
    folder = write(tmp_path, 10)
    (folder / MANIFEST).write_text('{"version": 2, "iteration": 10, "files": {}}')
    assert verify(folder) == ["its manifest lists no files"]


def test_two_swapped_directories_are_noticed(tmp_path):
    first, second = write(tmp_path, 10), write(tmp_path, 20)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    with pytest.raises(checkpoints.NoUsableCheckpoint, match="of iteration 10: the directory was renamed or swapped"):
        checkpoints.prepare_resume(tmp_path)


def test_only_a_directory_named_by_its_iteration_is_sealed(tmp_path):
    folder = write(tmp_path, 10, sealed=False).rename(tmp_path / "copy")
    with pytest.raises(ValueError, match="not called iter_NNNNNNN"):
        seal(folder)


def test_ranks_may_share_the_hashing(tmp_path):
    folder = write(tmp_path, 10, sealed=False)
    one, two = share_files(file_sizes(folder), 2)
    seal(folder, digest(folder, one) | digest(folder, two))
    assert verify(folder) == []


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.integers(0, 1000)), st.integers(1, 9))
def test_each_file_is_read_by_one_rank_and_no_rank_reads_much_more_than_its_part(sizes, ranks):
    shares = share_files(sizes, ranks)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) <= sum(sizes.values()) / ranks + max(sizes.values(), default=0)


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
    assert "iteration 30 skipped: it is not sealed: the save did not finish; deleted" in str(selection)
    assert "iteration 20 skipped: __0_0.distcp has 1000 bytes, not 1001; set aside as damaged-iter_0000020" in str(
        selection
    )
    assert (tmp_path / TRACKER).read_text() == "10"
    assert saved_iterations(tmp_path) == [10]
    assert (tmp_path / "damaged-iter_0000020").is_dir()


def test_a_checkpoint_that_lost_its_manifest_is_set_aside_and_can_be_vouched_for(tmp_path):
    write(tmp_path, 10)
    for number in range(2):
        folder = write(tmp_path, 20)
        (folder / MANIFEST).unlink()
        selection = checkpoints.prepare_resume(tmp_path)
        assert selection.iteration == 10
        name = "unsealed-iter_0000020" + ".1" * number
        assert f"its manifest.json is lost; set aside as {name}" in str(selection)
        assert payload_files(tmp_path / name) == [".metadata", "__0_0.distcp", "nested/__1_0.distcp"]
    assert checkpoints.set_aside(tmp_path) == ["unsealed-iter_0000020", "unsealed-iter_0000020.1"]
    (tmp_path / "unsealed-iter_0000020").rename(folder)
    assert main_of_survival("seal", folder) == 0
    assert checkpoints.prepare_resume(tmp_path).iteration == 20


def test_the_only_checkpoint_is_not_trusted_without_its_manifest(tmp_path):
    folder = write(tmp_path, 10)
    checkpoints.repoint_tracker(tmp_path, 10)
    (folder / MANIFEST).unlink()
    with pytest.raises(checkpoints.NoUsableCheckpoint, match=f"survival seal {folder}"):
        checkpoints.prepare_resume(tmp_path)
    assert saved_iterations(tmp_path) == [10]


def test_converted_weights_stay_what_the_run_starts_from(tmp_path):
    (tmp_path / TRACKER).write_text("release")
    assert checkpoints.prepare_resume(tmp_path).iteration is None
    assert (tmp_path / TRACKER).read_text() == "release"


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
    doomed = retention.expendable(iterations, keep_last, keep_every)
    kept = sorted(set(iterations) - set(doomed))
    assert set(doomed) <= iterations
    assert sorted(iterations)[-keep_last:] == kept[-keep_last:]
    milestones = {each for each in iterations if keep_every and each % keep_every == 0}
    assert set(kept) == milestones | set(sorted(iterations)[-keep_last:])


@pytest.mark.parametrize("wrong", [(0, 0), (1, -1)])
def test_retention_refuses_limits_that_keep_nothing(wrong):
    with pytest.raises(ValueError, match="keep_last"):
        retention.expendable([1, 2], *wrong)


def test_prune_counts_sealed_ones_only_and_protects(tmp_path):
    for iteration in (10, 20, 30, 40):
        write(tmp_path, iteration)
    write(tmp_path, 50, sealed=False)
    (tmp_path / "deleting-iter_0000005").mkdir()
    assert retention.prune(tmp_path, keep_last=1, keep_every=20, protect={10}) == [30]
    assert saved_iterations(tmp_path) == [10, 20, 40, 50]
    assert not list(tmp_path.glob("deleting-*"))


def test_room_is_judged_by_the_size_of_the_newest_sealed_checkpoint(tmp_path):
    assert retention.make_room(tmp_path).needed == 0
    write(tmp_path, 10)
    room = retention.make_room(tmp_path, margin=2)
    assert room.needed == 2 * (1000 + 1001 + 1002)
    assert room.enough == (shutil.disk_usage(tmp_path).free >= room.needed)
    assert not retention.Room(free=1, needed=2).enough


@given(st.dictionaries(st.integers(1, 100), st.integers(1, 100)), st.integers(-50, 500), st.sampled_from([0, 1, 2, 5]))
def test_room_is_made_from_the_oldest_on_and_never_of_the_newest_or_a_milestone(sizes, missing, keep_every):
    doomed = retention.to_free(sizes, missing, keep_every)
    may_go = retention.expendable(sizes, 1, keep_every)
    assert doomed == may_go[: len(doomed)]
    if doomed:
        assert sum(sizes[each] for each in doomed) >= missing > sum(sizes[each] for each in doomed[:-1])
    else:
        assert missing <= 0 or sum(sizes[each] for each in may_go) < missing


def test_the_newest_sound_checkpoint_stays_when_newer_ones_are_damaged(tmp_path):
    for iteration in (10, 20, 30):
        write(tmp_path, iteration)
    truncate(iteration_directory(tmp_path, 30) / "__0_0.distcp")
    assert retention.give_up_older(tmp_path) == [10]
    assert saved_iterations(tmp_path) == [20, 30]


def test_the_manifest_lists_sizes_and_hashes(tmp_path):
    folder = write(tmp_path, 10)
    content = json.loads((folder / MANIFEST).read_text())
    assert (content["version"], content["iteration"]) == (2, 10)
    assert not (folder / UNFINISHED).exists()
    files = content["files"]
    assert {name: entry["bytes"] for name, entry in files.items()} == {
        ".metadata": 1000,
        "__0_0.distcp": 1001,
        "nested/__1_0.distcp": 1002,
    }
    assert all(len(entry["sha256"]) == 64 for entry in files.values())
