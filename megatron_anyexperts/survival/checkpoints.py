"""Which checkpoint to resume from, which to keep, and what to do when the disk is full."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from .manifest import (
    TRACKER,
    is_sealed,
    iteration_directory,
    payload_bytes,
    saved_iterations,
    seal,
    sealed_iterations,
    verify,
    write_durably,
)

__all__ = [
    "NoUsableCheckpoint",
    "Room",
    "Selection",
    "discard",
    "expendable",
    "newest_sealed",
    "prepare_resume",
    "prune",
    "repoint_tracker",
    "room_for_save",
    "seal",
    "sealed_iterations",
    "select_resume",
    "verify",
]

_DOOMED = "deleting-"
_DAMAGED = "damaged-"


class NoUsableCheckpoint(RuntimeError):
    """Checkpoints were completed, and every one of them is damaged now."""


@dataclass(frozen=True)
class Selection:
    """The checkpoint to resume from and, newest first, why each newer one was passed over."""

    iteration: int | None
    skipped: tuple[tuple[int, str], ...]

    def __str__(self) -> str:
        chosen = "start from scratch" if self.iteration is None else f"resume from iteration {self.iteration}"
        return "; ".join([chosen, *(f"iteration {iteration} skipped: {why}" for iteration, why in self.skipped)])


@dataclass(frozen=True)
class Room:
    """Free space against what the next save needs, in bytes."""

    free: int
    needed: int

    @property
    def enough(self) -> bool:
        return self.free >= self.needed


def select_resume(save_dir: Path, hashes: bool = True) -> Selection:
    """The newest checkpoint that verifies; changes nothing.

    Raises:
        NoUsableCheckpoint: some were sealed and none verifies. Starting from scratch would then throw a run away.
    """
    skipped = []
    for iteration in reversed(saved_iterations(save_dir)):
        problems = verify(iteration_directory(save_dir, iteration), hashes)
        if not problems:
            return Selection(iteration, tuple(skipped))
        skipped.append((iteration, problems[0]))
    if sealed_iterations(save_dir):
        raise NoUsableCheckpoint(
            f"no checkpoint in {save_dir} is intact ({Selection(None, tuple(skipped))}); restore one from a backup, "
            "or move them away to start from scratch"
        )
    return Selection(None, tuple(skipped))


def prepare_resume(save_dir: Path, hashes: bool = True) -> Selection:
    """Make Megatron load the newest checkpoint that verifies.

    Newer ones are moved out of its way: a save that never finished is deleted, a damaged one is renamed to
    `damaged-iter_NNNNNNN` for inspection. The tracker file then names the chosen one, or is removed when there is none.
    Call it in one process, before any rank loads.

    Raises:
        NoUsableCheckpoint: see `select_resume`.
    """
    selection = select_resume(save_dir, hashes)
    for iteration, _ in selection.skipped:
        directory = iteration_directory(save_dir, iteration)
        if is_sealed(directory):
            target = directory.with_name(_DAMAGED + directory.name)
            shutil.rmtree(target, ignore_errors=True)
            directory.rename(target)
        else:
            discard(directory)
    if selection.iteration is None:
        (save_dir / TRACKER).unlink(missing_ok=True)
    else:
        repoint_tracker(save_dir, selection.iteration)
    return selection


def repoint_tracker(save_dir: Path, iteration: int) -> None:
    """Make Megatron's tracker file name `iteration`.

    Raises:
        FileNotFoundError: that checkpoint is not sealed, so nothing vouches for it.
    """
    directory = iteration_directory(save_dir, iteration)
    if not is_sealed(directory):
        raise FileNotFoundError(f"{directory} is not sealed; seal it before the tracker may name it")
    write_durably(save_dir / TRACKER, str(iteration))


def newest_sealed(save_dir: Path) -> int | None:
    """The newest sealed iteration, found without reading any checkpoint; None when there is none."""
    return max(sealed_iterations(save_dir), default=None)


def expendable(iterations: Iterable[int], keep_last: int, keep_every: int = 0) -> list[int]:
    """Which checkpoints retention gives up.

    Args:
        iterations: those that exist, in any order.
        keep_last: how many of the newest stay; at least 1.
        keep_every: iterations that are multiples of this stay for good; 0 keeps none for that reason.

    Raises:
        ValueError: keep_last < 1 or keep_every < 0.
    """
    if keep_last < 1 or keep_every < 0:
        raise ValueError(f"keep_last={keep_last}, keep_every={keep_every}; use keep_last >= 1 and keep_every >= 0")
    older = sorted(iterations)[:-keep_last]
    return [iteration for iteration in older if not keep_every or iteration % keep_every]


def prune(save_dir: Path, keep_last: int, keep_every: int = 0, protect: Collection[int] = ()) -> list[int]:
    """Delete checkpoints by the rule of `expendable`; only sealed ones count, and unsealed ones are left alone.

    Args:
        save_dir: directory of the `iter_NNNNNNN` directories.
        keep_last: see `expendable`.
        keep_every: see `expendable`.
        protect: iterations never to delete, such as the one a run was resumed from.

    Returns:
        the iterations deleted.
    """
    for leftover in save_dir.glob(_DOOMED + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
    doomed = [each for each in expendable(sealed_iterations(save_dir), keep_last, keep_every) if each not in protect]
    for iteration in doomed:
        discard(iteration_directory(save_dir, iteration))
    return doomed


def discard(checkpoint_dir: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that one deleted halfway is never taken for a checkpoint."""
    if checkpoint_dir.is_dir():
        doomed = checkpoint_dir.with_name(_DOOMED + checkpoint_dir.name)
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint_dir.rename(doomed)
        shutil.rmtree(doomed)


def room_for_save(save_dir: Path, margin: float = 1.1) -> Room:
    """Free space against the size of the newest sealed checkpoint times `margin`; 0 needed before the first."""
    newest = newest_sealed(save_dir)
    size = 0 if newest is None else payload_bytes(iteration_directory(save_dir, newest))
    return Room(free=shutil.disk_usage(save_dir).free, needed=int(size * margin))
