"""Which checkpoint to resume from, and what becomes of those that are passed over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_anyexperts.files import write_text

from .manifest import (
    RELEASE,
    TRACKER,
    is_sealed,
    is_unfinished,
    iteration_directory,
    saved_iterations,
    sealed_iterations,
    verify,
)
from .retention import discard

_SET_ASIDE = ("damaged-", "unsealed-")


class NoUsableCheckpoint(RuntimeError):
    """Checkpoints were completed, and none of them can be vouched for now."""


class NotSaved(RuntimeError):
    """The last steps of a run are in no checkpoint, because saving failed."""


@dataclass(frozen=True)
class Selection:
    """The checkpoint to resume from and, newest first, why each newer one was passed over."""

    iteration: int | None
    skipped: tuple[tuple[int, str], ...]

    def __str__(self) -> str:
        chosen = "start from scratch" if self.iteration is None else f"resume from iteration {self.iteration}"
        return "; ".join([chosen, *(f"iteration {iteration} skipped: {why}" for iteration, why in self.skipped)])


def select(iterations: Iterable[int], examine: Callable[[int], list[str]]) -> Selection:
    """The newest of some checkpoints in which `examine` finds no problem."""
    skipped = []
    for iteration in sorted(iterations, reverse=True):
        problems = examine(iteration)
        if not problems:
            return Selection(iteration, tuple(skipped))
        skipped.append((iteration, problems[0]))
    return Selection(None, tuple(skipped))


def select_resume(save_dir: Path, hashes: bool = True) -> Selection:
    """The newest checkpoint that verifies; changes nothing.

    Raises:
        NoUsableCheckpoint: some were complete once and none verifies. Starting from scratch would throw a run away.
    """
    selection = select(
        saved_iterations(save_dir), lambda iteration: verify(iteration_directory(save_dir, iteration), hashes)
    )
    refuse_total_loss(save_dir, selection)
    return selection


def refuse_total_loss(save_dir: Path, selection: Selection) -> None:
    """Raise `NoUsableCheckpoint` when nothing was selected although a save did finish once."""
    finished = [i for i, _ in selection.skipped if not is_unfinished(iteration_directory(save_dir, i))]
    if selection.iteration is None and finished:
        raise NoUsableCheckpoint(
            f"no checkpoint in {save_dir} is intact ({selection}); restore one from a backup, or move them away to "
            "start from scratch; one that lost nothing but its manifest gets a new one by "
            f"`python -m megatron_anyexperts.survival seal {iteration_directory(save_dir, finished[0])}`"
        )


def prepare_resume(save_dir: Path, hashes: bool = True) -> Selection:
    """Make Megatron load the newest checkpoint that verifies; see `carry_out`. Call it in one process.

    Raises:
        NoUsableCheckpoint: see `select_resume`.
    """
    return carry_out(save_dir, select_resume(save_dir, hashes))


def carry_out(save_dir: Path, selection: Selection) -> Selection:
    """Move what was passed over out of Megatron's way, and let the tracker name the selected checkpoint, if any.

    Only a save that never finished is deleted. A damaged checkpoint becomes `damaged-iter_NNNNNNN`, one that lost its
    manifest `unsealed-iter_NNNNNNN`. Call it in one process, before any rank loads.

    Returns:
        the selection with what became of each skipped checkpoint.

    Raises:
        NoUsableCheckpoint: see `select_resume`.
    """
    refuse_total_loss(save_dir, selection)
    skipped = tuple((i, f"{why}; {_out_of_the_way(iteration_directory(save_dir, i))}") for i, why in selection.skipped)
    if selection.iteration is not None:
        repoint_tracker(save_dir, selection.iteration)
    elif not holds_release(save_dir):
        (save_dir / TRACKER).unlink(missing_ok=True)
    return Selection(selection.iteration, skipped)


def _out_of_the_way(directory: Path) -> str:
    if is_unfinished(directory):
        discard(directory)
        return "deleted"
    prefix = _SET_ASIDE[0] if is_sealed(directory) else _SET_ASIDE[1]
    target, number = directory.with_name(prefix + directory.name), 0
    while target.exists():
        number += 1
        target = directory.with_name(f"{prefix}{directory.name}.{number}")
    directory.rename(target)
    return f"set aside as {target.name}"


def set_aside(save_dir: Path) -> list[str]:
    """Names of the directories that hold checkpoints no run resumes from any more; theirs to delete who looked."""
    return sorted(path.name for prefix in _SET_ASIDE for path in save_dir.glob(f"{prefix}*"))


def holds_release(save_dir: Path) -> bool:
    """Whether the tracker names converted or upcycled weights, which are no iteration and for which others vouch."""
    try:
        return (save_dir / TRACKER).read_text(encoding="utf-8").strip() == RELEASE
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def repoint_tracker(save_dir: Path, iteration: int) -> None:
    """Make Megatron's tracker file name `iteration`.

    Raises:
        FileNotFoundError: that checkpoint is not sealed, so nothing vouches for it.
    """
    directory = iteration_directory(save_dir, iteration)
    if not is_sealed(directory):
        raise FileNotFoundError(f"{directory} is not sealed; seal it before the tracker may name it")
    write_text(save_dir / TRACKER, str(iteration))


def newest_sealed(save_dir: Path) -> int | None:
    """The newest sealed iteration, found without reading any checkpoint; None when there is none."""
    return max(sealed_iterations(save_dir), default=None)
