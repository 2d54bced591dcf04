"""Which checkpoints to keep, and which to give up for the next save when the disk is full."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .manifest import file_sizes, iteration_directory, sealed_iterations, verify

_DOOMED = "deleting-"


@dataclass(frozen=True)
class Room:
    """Free space against what the next save needs, in bytes, and the checkpoints deleted to get there."""

    free: int
    needed: int
    deleted: tuple[int, ...] = ()

    @property
    def enough(self) -> bool:
        return self.free >= self.needed


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


def to_free(sizes: Mapping[int, int], missing: int, keep_every: int = 0) -> list[int]:
    """Which checkpoints to delete so that `missing` bytes become free: the oldest first, and no more than it takes.

    Args:
        sizes: bytes of each sound checkpoint by iteration; the newest of them always stays.
        missing: bytes needed beyond those free.
        keep_every: see `expendable`.

    Returns:
        iterations; none when all that may go would not be enough, since deleting them would help nobody.
    """
    chosen: list[int] = []
    for iteration in expendable(sizes, 1, keep_every):
        if missing <= 0:
            break
        chosen.append(iteration)
        missing -= sizes[iteration]
    return chosen if missing <= 0 else []


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
    _sweep(save_dir)
    doomed = [each for each in expendable(sealed_iterations(save_dir), keep_last, keep_every) if each not in protect]
    return _delete(save_dir, doomed)


def discard(checkpoint_dir: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that one deleted halfway is never taken for a checkpoint."""
    if checkpoint_dir.is_dir():
        doomed = checkpoint_dir.with_name(_DOOMED + checkpoint_dir.name)
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint_dir.rename(doomed)
        shutil.rmtree(doomed)


def make_room(save_dir: Path, keep_every: int = 0, margin: float = 1.1) -> Room:
    """Compare free space with what the next save needs; delete older checkpoints when it is too little.

    Args:
        save_dir: directory of the `iter_NNNNNNN` directories.
        keep_every: see `expendable`.
        margin: factor on the size of the newest sealed checkpoint, which is what a save is taken to need; nothing is
            before the first.
    """
    newest = max(sealed_iterations(save_dir), default=None)
    needed = 0 if newest is None else int(_size(iteration_directory(save_dir, newest)) * margin)
    free = shutil.disk_usage(save_dir).free
    if free >= needed:
        return Room(free, needed)
    _sweep(save_dir)
    free = shutil.disk_usage(save_dir).free
    doomed = _delete(save_dir, to_free(_sound_sizes(save_dir), needed - free, keep_every))
    return Room(shutil.disk_usage(save_dir).free, needed, tuple(doomed))


def give_up_older(save_dir: Path, keep_every: int = 0) -> list[int]:
    """Delete every sound checkpoint but the newest and those that `keep_every` protects; returns the iterations."""
    return _delete(save_dir, expendable(_sound_sizes(save_dir), 1, keep_every))


def _sound_sizes(save_dir: Path) -> dict[int, int]:
    """Bytes of each checkpoint whose names and sizes are those of its manifest, by iteration."""
    folders = {each: iteration_directory(save_dir, each) for each in sealed_iterations(save_dir)}
    return {each: _size(folder) for each, folder in folders.items() if not verify(folder, hashes=False)}


def _size(checkpoint_dir: Path) -> int:
    return sum(file_sizes(checkpoint_dir).values())


def _delete(save_dir: Path, iterations: list[int]) -> list[int]:
    for iteration in iterations:
        discard(iteration_directory(save_dir, iteration))
    return iterations


def _sweep(save_dir: Path) -> None:
    """Finish deletions that a crash interrupted."""
    for leftover in save_dir.glob(_DOOMED + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
