"""What surrounds Megatron's saving and loading: the data state inside, a seal behind it, a sound choice before it.

Megatron's training loop calls `save_checkpoint` and `load_checkpoint` of its own module; `Checkpoints.install` puts the
two methods below in their place. They call the originals.
"""

from __future__ import annotations

import argparse
import errno
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

from megatron_anyexperts.console import say
from megatron_anyexperts.platform.seams import replace
from megatron_anyexperts.survival import checkpoints as files
from megatron_anyexperts.survival import retention, runlog
from megatron_anyexperts.survival.checkpoints import NotSaved
from megatron_anyexperts.survival.heartbeat import Heartbeat
from megatron_anyexperts.survival.lock import RunLock
from megatron_anyexperts.survival.manifest import TRACKER, begin_save, file_sizes, iteration_directory, seal
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training import identity, resume, schedule
from megatron_anyexperts.training.comparison import RunSettings
from megatron_anyexperts.training.resume import CheckpointError
from megatron_anyexperts.training.together import attempt, on_rank_0, problem_of, shared_digest, tried_on_rank_0

DATA_STATE = "data_state.pt"
_UNVERIFIED_TRACKER = "latest_unverified_iteration.txt"
_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "PytorchStreamWriter failed")
"""How errors of a full disk read; torch's writer knows no error number."""


def say_on_rank_0(text: str) -> None:
    """`console.say` on one rank."""
    if torch.distributed.get_rank() == 0:
        say(text)


class Checkpoints:
    """Saves and loads the checkpoints of one run.

    Args:
        run: where events are logged; None logs none.
        keep_last: newest checkpoints that stay; 0 keeps all.
        keep_every: multiples of this iteration stay for good; 0 for no such exception.
        max_failed: failed saves in a row that end the run; 0 for no limit.
        heartbeat: told of saves, which may take much longer than a step.
        lock: rank 0's hold on the run, without which nothing is written any more.
        settings: what checkpoints say they were saved with, compared with the one that is loaded; None: nothing.
    """

    def __init__(
        self,
        run: Run | None,
        keep_last: int,
        keep_every: int,
        max_failed: int = 0,
        heartbeat: Heartbeat | None = None,
        lock: RunLock | None = None,
        settings: RunSettings | None = None,
    ):
        self.run = run
        self.settings = settings
        self.heartbeat = heartbeat
        self.lock = lock
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.max_failed = max_failed
        self.failures: list[tuple[int, str]] = []
        """Iterations and reasons of the failed saves since the last good one, the same on every rank."""
        self.train_loader: Any = None
        self._save = megatron_training.save_checkpoint
        self._load = megatron_training.load_checkpoint

    def install(self) -> None:
        """Let Megatron's training loop save and load through this object."""
        replace(megatron_training.__name__, "save_checkpoint", self.save)
        replace(megatron_training.__name__, "load_checkpoint", self.load)

    def _log(self, event: str, **fields: Any) -> None:
        if self.run is not None and torch.distributed.get_rank() == 0:
            runlog.append_event(self.run, event, **fields)

    def _beat(self, iteration: int, phase: str) -> Callable[[], None]:
        def beat() -> None:
            if self.heartbeat is not None:
                self.heartbeat.beat(iteration, phase)

        beat()
        return beat

    def save(self, iteration: int, *arguments: Any, **keywords: Any) -> None:
        """Save like Megatron; the tracker moves to the new checkpoint only after it was hashed and sealed.

        A save that fails (a full disk, a file system that errs for a moment) is removed and logged. The newest sound
        checkpoint is never touched; older ones make room when the disk is full.

        Raises:
            NotSaved: as many saves in a row failed as the run allows, or another training took the run over.
        """
        args = get_args()
        save_dir = Path(args.save)
        folder = iteration_directory(save_dir, iteration)
        beat = self._beat(iteration, "save")

        def write() -> None:
            restore = self._divert(args, save_dir, iteration)
            try:
                self._save(iteration, *arguments, **keywords)
            finally:
                restore()

        problem = self._make_room(save_dir, iteration) or self._write(folder, write)
        if any(sign in problem for sign in _FULL) and self._give_up_older(save_dir, folder, iteration):
            problem = self._write(folder, write)
        if problem:
            self._failed(folder, iteration, problem)
        elif not args.async_save:
            self._seal(save_dir, iteration, beat)

    def _make_room(self, save_dir: Path, iteration: int) -> str:
        """Return why there is too little room for a save, or ""."""

        def look() -> retention.Room:
            if self.lock is not None and not self.lock.held():
                raise NotSaved(f"another training took {self.lock.run.root} over; this one stops without saving")
            save_dir.mkdir(parents=True, exist_ok=True)
            return retention.make_room(save_dir, self.keep_every)

        room, error = tried_on_rank_0(look)
        if isinstance(error, NotSaved):
            raise error
        if error is not None:
            return problem_of(error)
        self._log_room(iteration, room.deleted)
        if room.enough:
            return ""
        aside = on_rank_0(lambda: files.set_aside(save_dir))
        hint = f"; {', '.join(aside)} may be deleted by hand" if aside else ""
        return f"{room.free} bytes free, about {room.needed} needed{hint}"

    def _give_up_older(self, save_dir: Path, folder: Path, iteration: int) -> bool:
        """Delete what a full disk left of a save, and all checkpoints but the newest; say whether that freed any."""

        def give_up() -> list[int]:
            retention.discard(folder)
            return retention.give_up_older(save_dir, self.keep_every)

        deleted, _ = tried_on_rank_0(give_up)
        self._log_room(iteration, deleted)
        return bool(deleted)

    def _log_room(self, iteration: int, deleted: Any) -> None:
        if deleted:
            listed = ", ".join(map(str, deleted))
            print_rank_0(f"WARNING: checkpoints of iterations {listed} deleted to make room for that of {iteration}")
            self._log("room", iteration=iteration, reason=f"deleted the checkpoints of iterations {listed}")

    def _write(self, folder: Path, write: Callable[[], None]) -> str:
        """Have all ranks write their parts of a checkpoint; return the first problem, or ""."""

        def begin() -> None:
            begin_save(folder)
            if self.settings is not None:
                identity.write(folder, self.settings.values)

        _, error = tried_on_rank_0(begin)
        return problem_of(error) or attempt(lambda: self._save_data_state(folder)) or attempt(write)

    def _divert(self, args: argparse.Namespace, save_dir: Path, iteration: int) -> Callable[[], None]:
        """Send Megatron's early tracker update elsewhere, and have an asynchronous save sealed when it is through."""
        tracker, schedule = (
            megatron_checkpointing.get_checkpoint_tracker_filename,
            megatron_checkpointing.schedule_async_save,
        )

        def schedule_and_seal(request: Any) -> None:
            request.add_finalize_fn(lambda: self._seal(save_dir, iteration))
            schedule(request)

        def put(tracker: Callable, schedule: Callable) -> None:
            replace(megatron_checkpointing.__name__, "get_checkpoint_tracker_filename", tracker)
            replace(megatron_checkpointing.__name__, "schedule_async_save", schedule)

        put(lambda path: os.path.join(path, _UNVERIFIED_TRACKER), schedule_and_seal)
        return lambda: put(tracker, schedule)

    def _save_data_state(self, folder: Path) -> None:
        if self.train_loader is None:
            return
        state = self.train_loader.state_for_checkpoint(mpu.get_data_parallel_group())
        first = mpu.get_data_parallel_rank() == 0 and mpu.get_context_parallel_rank() == 0
        if first and mpu.is_pipeline_first_stage(ignore_virtual=True):
            torch.save({**state, "iteration": int(folder.name.removeprefix("iter_"))}, folder / DATA_STATE)

    def _seal(self, save_dir: Path, iteration: int, beat: Callable[[], None] = lambda: None) -> None:
        """Hash the files on all ranks, seal, move the tracker, delete what retention gives up."""
        folder = iteration_directory(save_dir, iteration)
        sizes, error = tried_on_rank_0(lambda: file_sizes(folder), beat)
        digests, problem = ({}, problem_of(error)) if error else shared_digest(folder, sizes, beat)

        def finish() -> None:
            seal(folder, digests)
            try:
                files.repoint_tracker(save_dir, iteration)
            except OSError:
                # Once renamed into place the tracker vouches for a sealed checkpoint, whatever flushing it said.
                if (save_dir / TRACKER).read_text() != str(iteration):
                    raise

        def clean_up() -> None:
            (save_dir / _UNVERIFIED_TRACKER).unlink(missing_ok=True)
            if self.keep_last:
                retention.prune(save_dir, self.keep_last, self.keep_every)

        problem = problem or problem_of(tried_on_rank_0(finish, beat)[1])
        if problem:
            self._failed(folder, iteration, problem)
            return
        self.failures.clear()
        self._log("saved", iteration=iteration)
        say_on_rank_0(f"saved iteration {iteration} in {folder}")
        _, error = tried_on_rank_0(clean_up, beat)
        if error is not None:
            print_rank_0(f"WARNING: older checkpoints not deleted: {problem_of(error)}; the next save tries again")

    def _failed(self, folder: Path, iteration: int, reason: str) -> None:
        _, error = tried_on_rank_0(lambda: retention.discard(folder))
        if error is not None:
            reason += f"; what it wrote is not deleted: {problem_of(error)}"
        print_rank_0(f"WARNING: checkpoint of iteration {iteration} not saved: {reason}; the newest one is untouched")
        self._log("save_failed", iteration=iteration, reason=reason)
        self.failures.append((iteration, reason))
        if self.max_failed and len(self.failures) >= self.max_failed:
            raise NotSaved(f"--max-failed-saves {self.max_failed}: that many failed in a row, the last one: {reason}")

    def refuse_unsaved(self) -> None:
        """Raise `NotSaved` when the last save of a run that is over has failed."""
        if self.failures:
            iteration, reason = self.failures[-1]
            raise NotSaved(f"iteration {iteration} is in no checkpoint, because saving failed: {reason}")

    def load(self, model: Any, optimizer: Any, scheduler: Any, *arguments: Any, **keywords: Any) -> tuple[int, Any]:
        """Load like Megatron: the run's own newest checkpoint that verifies, else what the command names.

        Raises:
            CheckpointError: the checkpoint does not fit the model or the settings.
            NoUsableCheckpoint: every checkpoint of the run is damaged.
        """
        args = get_args()
        beat = self._beat(0, "start")
        own = resume.select_own(Path(args.save), beat) if args.save else files.Selection(None, ())
        if own.skipped:
            print_rank_0(f"WARNING: {own}")
            self._log("fallback", iteration=own.iteration, reason=str(own))
        if own.iteration is None:
            resume.check_elsewhere(args, beat)
        else:
            for note in resume.go_on(args, own.iteration):
                say_on_rank_0(f"note: {note}; the run goes on after its own iteration {own.iteration}")
            resume.refuse_lost_optimizer(args, own.iteration)
        source = args.load
        if args.pretrained_checkpoint and not megatron_checkpointing.checkpoint_exists(args.load):
            source = args.pretrained_checkpoint  # as Megatron chooses
        changed_schedule = self._compare(args)
        try:
            loaded = self._load(model, optimizer, scheduler, *arguments, **keywords)
        except (Exception, CheckpointException) as error:
            # Of torch's errors of all ranks, and of a mismatch in every tensor, the last line names the first cause.
            # Many of Megatron's assertions say nothing; then their kind has to do.
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise CheckpointError(
                f"the checkpoint in {source} does not fit this run: {reason}; "
                "use the settings it was saved with, --change-schedule for another schedule, or another --run-dir (or "
                "--load) for a new model"
            ) from error
        if own.iteration not in (None, loaded[0]):
            raise CheckpointError(f"{source}: the directory of iteration {own.iteration} holds iteration {loaded[0]}")
        if changed_schedule and args.override_opt_param_scheduler and scheduler is not None:
            schedule.reposition(scheduler, args, loaded[0])
        return loaded

    def _compare(self, args: argparse.Namespace) -> bool:
        """Compare again when the checkpoint is not the one expected at the start; whether the schedule is a new one."""

        def look() -> bool:
            if self.settings is None:
                return False
            if self.settings.compare(args):
                self.settings.announce(self.run)
            return self.settings.compared is not None and self.settings.compared.schedule_changed

        return on_rank_0(look)

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
        state = torch.load(path, weights_only=True)
        if state.get("iteration", args.iteration) != args.iteration:
            raise CheckpointError(f"{path} is of iteration {state['iteration']}, the weights are of {args.iteration}")
        try:
            loader.restore(state)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
