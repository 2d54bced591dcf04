"""Where a start of training begins: the run's own newest checkpoint, or what the command names for a first start."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch.distributed.checkpoint as dcp
from megatron.training import print_rank_0

from megatron_anyexperts.survival import checkpoints as files
from megatron_anyexperts.survival.checkpoints import Selection
from megatron_anyexperts.survival.manifest import (
    RELEASE,
    TRACKER,
    Unsound,
    changed_files,
    is_sealed,
    iteration_directory,
    saved_iterations,
    sound_list,
)
from megatron_anyexperts.survival.signing import signing_key
from megatron_anyexperts.training.together import on_rank_0, shared_digest, tried_on_rank_0

FIRST_START = ("finetune", "no_load_optim", "no_load_rng", "ckpt_step")
"""Flags that say how to begin from another checkpoint; the run's own is always continued as a whole."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be loaded into this run; the message says why and what to do."""


def examine(directory: Path, meanwhile: Callable[[], None] = lambda: None) -> list[str]:
    """`manifest.verify` by all ranks together: each reads a share of the files."""
    expected, error = tried_on_rank_0(lambda: sound_list(directory), meanwhile)
    if isinstance(error, Unsound):
        return [str(error)]
    if error is not None:
        raise error
    found, problem = shared_digest(directory, {name: entry["bytes"] for name, entry in expected.items()}, meanwhile)
    return [problem] if problem else changed_files(expected, found)


def select_own(save_dir: Path, meanwhile: Callable[[], None] = lambda: None) -> Selection:
    """Choose among a run's own checkpoints, by all ranks together, and move what is passed over out of the way.

    Raises:
        NoUsableCheckpoint: some were complete once and none can be vouched for now.
    """
    iterations = on_rank_0(lambda: saved_iterations(save_dir), meanwhile)
    selection = files.select(iterations, lambda i: examine(iteration_directory(save_dir, i), meanwhile))
    return on_rank_0(lambda: files.carry_out(save_dir, selection), meanwhile)


def go_on(args: argparse.Namespace, iteration: int) -> list[str]:
    """Make Megatron continue the run's own checkpoint, whatever the command says of its first start.

    Returns:
        what has to be said of it, one sentence each.
    """
    notes = []
    if args.load != args.save and args.load:
        notes.append(f"--load {args.load} acts on the first start only")
    args.load = args.save
    keeps_optimizer = not args.no_load_optim or on_rank_0(lambda: has_optimizer(args.save, iteration))
    for name in FIRST_START:
        if name == "no_load_optim" and not keeps_optimizer:
            continue  # the way out that `refuse_lost_optimizer` names
        if getattr(args, name):
            notes.append(f"--{name.replace('_', '-')} acts on the first start only")
            setattr(args, name, None if name == "ckpt_step" else False)
    return notes


def has_optimizer(load_dir: str, iteration: int) -> bool:
    """Whether a distributed checkpoint holds the state of an optimizer; True for other formats, which are not read."""
    directory = iteration_directory(Path(load_dir), iteration)
    if not (directory / ".metadata").exists():
        return True
    metadata = dcp.FileSystemReader(directory).read_metadata()
    return any(key.startswith(("optimizer.", "chained_")) for key in metadata.state_dict_metadata)


def check_elsewhere(args: argparse.Namespace, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Verify the checkpoint of another folder that a first start names, if it is sealed.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    named = [(f"--{name.replace('_', '-')}", getattr(args, name)) for name in ("load", "pretrained_checkpoint")]
    named = [(flag, folder) for flag, folder in named if folder and folder != args.save]
    if not named or any("://" in folder for _, folder in named):
        return
    exists = on_rank_0(lambda: [(Path(folder) / TRACKER).is_file() for _, folder in named])
    if not any(exists):
        lacking = ", ".join(f"{flag} {folder}" for flag, folder in named)
        raise CheckpointError(f"{lacking}: no {TRACKER} there; name the folder in which the folders iter_* lie")
    flag, folder = named[exists.index(True)]
    newest = on_rank_0(lambda: (Path(folder) / TRACKER).read_text(encoding="utf-8").strip())
    step = args.ckpt_step if flag == "--load" and args.ckpt_step else newest
    directory = Path(folder, RELEASE) if step == RELEASE else iteration_directory(Path(folder), int(step))
    check_foreign(directory, f"{flag} {folder}", meanwhile)


def check_foreign(directory: Path, named: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Verify a checkpoint that is not the run's own, if it is sealed; with a key it has to be, and signed.

    Args:
        directory: of the one checkpoint.
        named: how the user named it.

    Raises:
        CheckpointError: it is damaged, or not signed with the key.
    """
    if signing_key() is None and not on_rank_0(lambda: is_sealed(directory)):
        print_rank_0(f"WARNING: {directory} is not sealed: nothing vouches for its files")
    elif problems := examine(directory, meanwhile):
        raise CheckpointError(f"{named}: {directory.name} may not be loaded: {problems[0]}")


def refuse_lost_optimizer(args: argparse.Namespace, iteration: int) -> None:
    """Say what to do with a checkpoint that was saved with ``--no-save-optim``.

    Raises:
        CheckpointError: the run would need its optimizer state.
    """
    if args.finetune or args.no_load_optim or on_rank_0(lambda: has_optimizer(args.load, iteration)):
        return
    raise CheckpointError(
        f"iteration {iteration} in {args.load} holds no optimizer state (it was saved with --no-save-optim): add "
        "--no-load-optim to go on from its weights, iteration and data with a new optimizer and a schedule from its "
        "beginning, or start a new run with --pretrained-checkpoint"
    )
