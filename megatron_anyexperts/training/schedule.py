"""The schedule of a run, checked before anything starts, and changed on resume.

The learning rate, the weight decay and the batch at an iteration are what the command line gives at that iteration,
as in a run that had these flags from the start. Moments and step counts of the optimizer go on.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer, MegatronOptimizer

from megatron_anyexperts.platform.seams import replace


def check(args: argparse.Namespace) -> None:
    """Refuse schedules that Megatron's scheduler would refuse by a bare assertion once the model is built.

    Raises:
        ValueError: names the flags and the way out.
    """
    if not args.train_iters and not args.train_samples:
        raise ValueError("neither --train-iters nor --train-samples is given; say how long to train")
    if args.lr is None:
        raise ValueError("--lr is not given")
    for flag, value in (("--min-lr", args.min_lr), ("--lr-warmup-init", args.lr_warmup_init)):
        if value is not None and not 0 <= value <= args.lr:
            raise ValueError(f"{flag} {value} lies outside of 0 and --lr {args.lr}")
    unit = "iters" if args.train_iters else "samples"
    length = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
    named = f"--lr-decay-{unit}" if getattr(args, f"lr_decay_{unit}") else f"--train-{unit}"
    warmup, flag = getattr(args, f"lr_warmup_{unit}"), f"--lr-warmup-{unit}"
    if args.lr_warmup_fraction is not None:
        warmup, flag = args.lr_warmup_fraction * length, f"--lr-warmup-fraction {args.lr_warmup_fraction}, that is"
    if warmup >= length:
        raise ValueError(f"{flag} {warmup}: the warm-up must end before the decay, which ends at {named} {length}")
    if args.lr_decay_style == "WSD" and not getattr(args, f"lr_wsd_decay_{unit}"):
        raise ValueError(f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}, the length of its last stretch")
    if args.change_schedule and args.use_checkpoint_opt_param_scheduler:
        raise ValueError("--change-schedule and --use-checkpoint-opt-param-scheduler contradict each other; use one")


def reposition(scheduler: Any, args: argparse.Namespace, iteration: int) -> None:
    """Put a loaded scheduler, which counts samples, where a run with this command line stands at `iteration`.

    With ``--train-samples``, which a batch size that follows a schedule needs, the samples trained so far are the
    position, and it stays.
    """
    if args.train_samples is None:
        scheduler.num_steps = 0
        scheduler.step(iteration * args.global_batch_size)


def groups_by_flags(current: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer that goes on: the settings of this run and the step count of the checkpoint.

    Megatron looks saved groups up by their learning rates and takes all settings from them: no rate can change, and
    changes of other settings (betas, epsilon) are ignored. No look-up is needed, since states are stored by parameter.

    Args:
        current: groups made from the command line.
        saved: groups of the checkpoint, of any number and order.

    Raises:
        ValueError: the groups of the checkpoint took different numbers of steps.
    """
    steps = {group["step"] for group in saved if "step" in group}
    if len(steps) > 1:
        raise ValueError(f"parameter groups of the checkpoint took different numbers of steps: {sorted(steps)}")
    kept = {"step": steps.pop()} if steps else {}
    return [{**group, **kept} for group in current]


def _settings(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def _with_groups_by_flags(load_state_dict):
    @functools.wraps(load_state_dict)
    def wrapper(self, state_dict):
        inner = state_dict.get("optimizer", {})
        if "param_groups" in inner:
            groups = groups_by_flags(_settings(self.optimizer.param_groups), inner["param_groups"])
            state_dict = {**state_dict, "optimizer": {**inner, "param_groups": groups}}
        return load_state_dict(self, state_dict)

    return wrapper


def _numbered(_filter_and_reorder_param_groups):
    def in_order_of_parameters(current_groups: list[dict], state_dict_groups: list[dict]) -> list[dict]:
        groups, start = groups_by_flags(_settings(current_groups), state_dict_groups), 0
        for group, own in zip(groups, current_groups, strict=True):
            group["params"] = list(range(start, start + len(own["params"])))
            start += len(own["params"])
        return groups

    return staticmethod(in_order_of_parameters)


def _without_groups(sharded_state_dict):
    @functools.wraps(sharded_state_dict)
    def wrapper(self, model_sharded_state_dict, is_loading=False, *args, **kwargs):
        state = sharded_state_dict(self, model_sharded_state_dict, is_loading, *args, **kwargs)
        if is_loading:  # parameter numbers in them would be merged with the saved groups one by one
            del state["param_groups"]
        return state

    return wrapper


PATCHES = (
    (DistributedOptimizer, "load_state_dict", _with_groups_by_flags),
    (MegatronOptimizer, "_filter_and_reorder_param_groups", _numbered),
    (FP32Optimizer, "sharded_state_dict", _without_groups),
)
"""Class, method, and what wraps it so that `groups_by_flags` decides."""


@functools.cache
def install() -> None:
    """Let Megatron's optimizers go on with the settings of the command line; repeated calls are harmless."""
    for cls, name, wrap in PATCHES:
        replace(cls.__module__, f"{cls.__name__}.{name}", wrap(vars(cls)[name]))
