"""Compares a run's settings with those of the checkpoint it starts from: refuses, or says in one line what differs."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_anyexperts.console import say
from megatron_anyexperts.moe.config import AnyExpertsConfig
from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.checkpoints import newest_sealed
from megatron_anyexperts.survival.manifest import TRACKER, iteration_directory
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training import identity
from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.training.flag_classes import Kind
from megatron_anyexperts.training.identity import Difference

_WAYS_OUT = {
    Kind.SHAPES: "the weights fit no other sizes; use those of the checkpoint, or a new --run-dir for a new model",
    Kind.MEANING: "the weights were trained for the value of the checkpoint; use it, or take them for the new one with "
    "--accept-change",
    Kind.SCHEDULE: "add --change-schedule to go on with the new values, or use the old ones",
    Kind.STATE: "a resumed run continues its data and optimizer states; use the old values, or start a new --run-dir "
    "from these weights with --pretrained-checkpoint",
}


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run begins from.

    Attributes:
        folder: directory of the one checkpoint.
        iteration: its iteration; 0 for weights alone.
        resumed: the run goes on with optimizer, schedule and data; False when it takes the weights alone.
    """

    folder: Path
    iteration: int
    resumed: bool


def starting_point(args: argparse.Namespace, own: bool = True) -> Start | None:
    """The checkpoint that Megatron will load, found without reading it; None for a new model.

    Args:
        args: Megatron's arguments.
        own: a checkpoint that the run saved goes before what the command names; False for tools that only read.
    """
    if own and args.save and (newest := newest_sealed(Path(args.save))) is not None:
        return Start(iteration_directory(Path(args.save), newest), newest, True)
    named = ((args.load, args.finetune, args.ckpt_step), (args.pretrained_checkpoint, True, None))
    for folder, weights_alone, step in named:
        tracker = Path(folder or "") / TRACKER
        if folder is None or not tracker.is_file():
            continue
        name = tracker.read_text(encoding="utf-8").strip()
        if not name.isdecimal():
            return Start(tracker.with_name(name), 0, False)
        iteration = step or int(name)
        return Start(iteration_directory(tracker.parent, iteration), iteration, own and not weights_alone)
    return None


@dataclass(frozen=True)
class Comparison:
    """What differs from a checkpoint and is allowed to.

    Attributes:
        start: the checkpoint.
        found: allowed differences; None when the checkpoint does not say what it was saved with.
    """

    start: Start
    found: tuple[Difference, ...] | None

    @property
    def schedule_changed(self) -> bool:
        """Whether a resumed run has, or may have, another schedule than the checkpoint's."""
        return self.start.resumed and (self.found is None or any(each.kind is Kind.SCHEDULE for each in self.found))

    def __str__(self) -> str:
        doing = f"resuming {self.start.folder}" if self.start.resumed else f"taking the weights of {self.start.folder}"
        if self.found is None:
            return f"{doing}; it does not say with which settings it was saved: not checked"
        if not self.found:
            return f"{doing}; the settings are those it was saved with"
        listed = "; ".join(f"{identity.describe(each)} ({each.kind.value})" for each in self.found)
        return f"{doing}; other settings than it was saved with: {listed}"


def compare(args: argparse.Namespace, now: Mapping[str, Any], start: Start, new_shapes: bool = False) -> Comparison:
    """Compare this run's settings with those of a checkpoint.

    Args:
        args: Megatron's arguments, which say what may differ.
        now: this run's settings, from `identity.settings`.
        start: the checkpoint.
        new_shapes: whether a model of other shapes is made from it.

    Raises:
        UsageError: settings differ that must not; all are listed, each with its way out.
    """
    accepted = identity.acceptable(args.accept_change)
    saved = identity.read(start.folder)
    if saved is None:
        return Comparison(start, None)
    found = [each for each in identity.differences(saved, now) if not (new_shapes and each.kind is Kind.SHAPES)]
    if wrong := identity.refused(found, start.resumed, accepted, _asks_for_new_schedule(args)):
        raise UsageError(f"{start.folder} was saved with other settings: {_refusal(wrong)}")
    if start.resumed and args.train_iters is not None and start.iteration > args.train_iters:
        raise UsageError(
            f"--train-iters {args.train_iters}: {start.folder} is {start.iteration - args.train_iters} iterations "
            f"further; use {start.iteration} or more, or --load an older checkpoint with a new --run-dir"
        )
    relevant = {Kind.MEANING, Kind.DIALS} | ({Kind.SCHEDULE} if start.resumed else set())
    return Comparison(start, tuple(each for each in found if each.kind in relevant))


def _asks_for_new_schedule(args: argparse.Namespace) -> bool:
    return args.change_schedule or args.override_opt_param_scheduler


def _refusal(wrong: list[Difference]) -> str:
    lines = []
    for kind in dict.fromkeys(each.kind for each in wrong):
        ours = [each for each in wrong if each.kind is kind]
        names = " ".join(identity.flag_of(each).lstrip("-") for each in ours) if kind is Kind.MEANING else ""
        lines.append(f"{'; '.join(map(identity.describe, ours))} ({f'{_WAYS_OUT[kind]} {names}'.strip()})")
    return "\n  ".join(lines)


class RunSettings:
    """The settings of this run, and how they compare with those of the checkpoint that it starts from.

    Args:
        args: Megatron's arguments, validated.
        config: the decoder's configuration made from them.
        own: see `starting_point`.

    Attributes:
        values: what the run's checkpoints say they were saved with.
        compared: outcome of the last `compare`; None for a new model.
    """

    def __init__(self, args: argparse.Namespace, config: AnyExpertsConfig, own: bool = True):
        self.values = identity.settings(args, config)
        self.compared: Comparison | None = None
        self._own = own

    def compare(self, args: argparse.Namespace) -> bool:
        """Compare with the checkpoint that will be loaded; whether it is another one than at the call before.

        Raises:
            UsageError: see the function `compare`.
        """
        start = starting_point(args, self._own)
        if start is None or self.compared is not None and start == self.compared.start:
            return False
        self.compared = compare(args, self.values, start)
        return True

    def foresee(self, args: argparse.Namespace) -> None:
        """`compare` before any checkpoint was verified: one with a damaged file is left to the load, which falls back.

        Raises:
            UsageError: see the function `compare`.
        """
        with contextlib.suppress(identity.Unreadable):
            self.compare(args)

    def announce(self, run: Run | None) -> None:
        """Print what differs and record it in the run's events; call it on rank 0."""
        if self.compared is None:
            return
        start, found = self.compared.start, self.compared.found
        say(str(self.compared))
        if run is not None:
            how = "resumed" if start.resumed else "weights alone"
            changed = "unknown" if found is None else {each.name: [each.saved, each.now] for each in found}
            runlog.append_event(
                run, "load", iteration=start.iteration, reason=f"{how}, {start.folder}", changed=changed
            )
