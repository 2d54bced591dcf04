"""What surrounds Megatron's saving and loading: the data state inside, a seal behind it, a sound choice before it.

Megatron's training loop calls `save_checkpoint` and `load_checkpoint` of its own module; `Checkpoints.install` puts the
two methods below in their place. They call the originals.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import checkpointing as megatron_checkpointing
from megatron.training import get_args, print_rank_0
from megatron.training import training as megatron_training
from torch.distributed.checkpoint.api import CheckpointException

from megatron_anyexperts.survival import checkpoints as files
from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.heartbeat import Heartbeat
from megatron_anyexperts.survival.manifest import TRACKER, digest, iteration_directory, payload_files
from megatron_anyexperts.survival.run import Run

DATA_STATE = "data_state.pt"
_UNVERIFIED_TRACKER = "latest_unverified_iteration.txt"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be loaded into this run; the message says why and what to do."""


def _agreed(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _on_rank_0(call: Callable[[], Any]) -> Any:
    """Run `call` on rank 0 only and return its result, or raise its error, on every rank."""
    result, error = None, None
    if torch.distributed.get_rank() == 0:
        try:
            result = call()
        except Exception as raised:  # handed to every rank below, so that none waits for another
            error = raised
    result, error = _agreed((result, error))
    if error is not None:
        raise error
    return result


def _tried(call: Callable[[], Any]) -> tuple[Any, str]:
    """Return the result of `call` and "", or None and its problem."""
    try:
        return call(), ""
    except (Exception, CheckpointException) as error:  # torch's is no Exception but a BaseException
        return None, f"{type(error).__name__}: {error}"


def _attempt(call: Callable[[], Any]) -> str:
    """Run `call` on every rank; return the first rank's problem on every rank, or "" when there was none."""
    problems: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, _tried(call)[1])
    return next(filter(None, problems), "")


def _attempt_on_rank_0(call: Callable[[], Any]) -> tuple[Any, str]:
    """Run `call` on rank 0 only; return on every rank its result, or None, and its problem, or ""."""
    return _on_rank_0(lambda: _tried(call))


class Checkpoints:
    """Saves and loads the checkpoints of one run.

    Args:
        run: where events are logged; None logs none.
        keep_last: newest checkpoints that stay; 0 keeps all.
        keep_every: multiples of this iteration stay for good; 0 for no such exception.
        heartbeat: told of saves, which may take much longer than a step.
    """

    def __init__(self, run: Run | None, keep_last: int, keep_every: int, heartbeat: Heartbeat | None = None):
        self.run = run
        self.heartbeat = heartbeat
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.train_loader: Any = None
        self._save = megatron_training.save_checkpoint
        self._load = megatron_training.load_checkpoint

    def install(self) -> None:
        """Let Megatron's training loop save and load through this object."""
        megatron_training.save_checkpoint = self.save
        megatron_training.load_checkpoint = self.load

    def _log(self, event: str, **fields: Any) -> None:
        if self.run is not None and torch.distributed.get_rank() == 0:
            runlog.append_event(self.run, event, **fields)

    def save(self, iteration: int, *arguments: Any, **keywords: Any) -> None:
        """Save like Megatron; the tracker moves to the new checkpoint only after it was hashed and sealed.

        A save that fails (a full disk, a file system that errs for a moment) is removed and logged; older checkpoints
        and the run are not touched.
        """
        if self.heartbeat is not None:
            self.heartbeat.beat(iteration, "save")
        args = get_args()
        save_dir = Path(args.save)
        folder = iteration_directory(save_dir, iteration)
        room, problem = _attempt_on_rank_0(lambda: self._make_room(save_dir))
        if not problem and not room.enough:
            problem = f"{room.free} bytes free, about {room.needed} needed"
        problem = problem or _attempt(lambda: self._save_data_state(folder))
        if not problem:
            restore = self._divert(args, save_dir, iteration)
            problem = _attempt(lambda: self._save(iteration, *arguments, **keywords))
            restore()
        if problem:
            self._failed(folder, iteration, problem)
        elif not args.async_save:
            self._seal(save_dir, iteration)

    def _make_room(self, save_dir: Path) -> files.Room:
        save_dir.mkdir(parents=True, exist_ok=True)
        return files.room_for_save(save_dir)

    def _divert(self, args: argparse.Namespace, save_dir: Path, iteration: int) -> Callable[[], None]:
        """Send Megatron's early tracker update elsewhere, and have an asynchronous save sealed when it is through."""
        tracker, schedule = (
            megatron_checkpointing.get_checkpoint_tracker_filename,
            megatron_checkpointing.schedule_async_save,
        )

        def schedule_and_seal(request: Any) -> None:
            request.add_finalize_fn(lambda: self._seal(save_dir, iteration))
            schedule(request)

        megatron_checkpointing.get_checkpoint_tracker_filename = lambda path: os.path.join(path, _UNVERIFIED_TRACKER)
        megatron_checkpointing.schedule_async_save = schedule_and_seal

        def restore() -> None:
            megatron_checkpointing.get_checkpoint_tracker_filename = tracker
            megatron_checkpointing.schedule_async_save = schedule

        return restore

    def _save_data_state(self, folder: Path) -> None:
        if self.train_loader is None:
            return
        state = self.train_loader.state_for_checkpoint(mpu.get_data_parallel_group())
        if mpu.get_data_parallel_rank() == 0 and mpu.is_pipeline_first_stage(ignore_virtual=True):
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / DATA_STATE)

    def _seal(self, save_dir: Path, iteration: int) -> None:
        """Hash the files on all ranks, seal, move the tracker, delete what retention gives up."""
        folder = iteration_directory(save_dir, iteration)
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        names, problem = _attempt_on_rank_0(lambda: payload_files(folder))
        mine: dict[str, Any] = {}
        problem = problem or _attempt(lambda: mine.update(digest(folder, names[rank::world])))
        if problem:
            self._failed(folder, iteration, problem)
            return
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, mine)

        def finish() -> None:
            files.seal(folder, {name: entry for part in parts for name, entry in part.items()})
            try:
                files.repoint_tracker(save_dir, iteration)
            except OSError:
                # Once renamed into place the tracker vouches for a sealed checkpoint, whatever flushing it said.
                if (save_dir / TRACKER).read_text() != str(iteration):
                    raise

        def clean_up() -> None:
            (save_dir / _UNVERIFIED_TRACKER).unlink(missing_ok=True)
            if self.keep_last:
                files.prune(save_dir, self.keep_last, self.keep_every)

        _, problem = _attempt_on_rank_0(finish)
        if problem:
            self._failed(folder, iteration, problem)
            return
        self._log("saved", iteration=iteration)
        _, problem = _attempt_on_rank_0(clean_up)
        if problem:
            print_rank_0(f"WARNING: older checkpoints not deleted: {problem}; the next save tries again")

    def _failed(self, folder: Path, iteration: int, reason: str) -> None:
        _, problem = _attempt_on_rank_0(lambda: files.discard(folder))
        if problem:
            reason += f"; what it wrote is not deleted: {problem}"
        print_rank_0(f"WARNING: checkpoint of iteration {iteration} not saved: {reason}; older ones are untouched")
        self._log("save_failed", iteration=iteration, reason=reason)

    def load(self, model: Any, optimizer: Any, scheduler: Any, *arguments: Any, **keywords: Any) -> tuple[int, Any]:
        """Load like Megatron, from the newest checkpoint that verifies.

        Raises:
            CheckpointError: the checkpoint does not fit the model or the settings.
            NoUsableCheckpoint: every checkpoint of the run is damaged.
        """
        args = get_args()
        if args.load and args.load == args.save:
            selection = _on_rank_0(lambda: self._choose(Path(args.load)))
            if selection.skipped:
                print_rank_0(f"WARNING: {selection}")
                self._log("fallback", iteration=selection.iteration, reason=str(selection))
        source = args.load
        if args.pretrained_checkpoint and not megatron_checkpointing.checkpoint_exists(args.load):
            source = args.pretrained_checkpoint  # as Megatron chooses
        try:
            return self._load(model, optimizer, scheduler, *arguments, **keywords)
        except (Exception, CheckpointException) as error:
            # Of torch's errors of all ranks, and of a mismatch in every tensor, the last line names the first cause.
            # Many of Megatron's assertions say nothing; then their kind has to do.
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise CheckpointError(
                f"the checkpoint in {source} does not fit this run: {reason}; "
                "use the model settings it was saved with, or another --run-dir (or --load) for a new model"
            ) from error

    @staticmethod
    def _choose(load_dir: Path) -> files.Selection:
        if not files.sealed_iterations(load_dir) and (load_dir / "latest_checkpointed_iteration.txt").exists():
            return files.Selection(None, ())  # saved or converted by other tools: theirs to vouch for
        return files.prepare_resume(load_dir)

    def restore_data(self, loader: Any) -> None:
        """Put the training loader where the loaded checkpoint left the data; a fresh run starts at the beginning.

        Raises:
            CheckpointError: the checkpoint has no data state, or one of other data settings.
        """
        self.train_loader = loader
        args = get_args()
        if not args.iteration:
            return
        path = iteration_directory(Path(args.load), args.iteration) / DATA_STATE
        if not path.exists():
            raise CheckpointError(f"{path} is missing: samples would repeat; use --finetune to start the data anew")
        try:
            loader.restore(torch.load(path, weights_only=True))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
