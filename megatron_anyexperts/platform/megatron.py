"""Repairs of Megatron-Core 0.19.2 that a correct checkpoint depends on, on CPU and on GPU alike.

`tests/unit/platform/test_megatron.py` shows each fault in the installed release, so that a repair which is no longer
needed is noticed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_anyexperts.platform.sharded_states import load_sharded_states, sharded_states


def _of_own_range(_sharded_param_state):
    def sharded_param_state(self, model_sharded_state_dict, is_loading=False, metadata=None):
        return sharded_states(self, model_sharded_state_dict, is_loading)

    return sharded_param_state


def _into_own_range(_load_parameter_state):
    return load_sharded_states


def _is_torch_adam(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def _with_state_before_load(sharded_state_dict):
    @functools.wraps(sharded_state_dict)
    def wrapper(self, model_sharded_state_dict, is_loading=False, *args, **kwargs):
        if is_loading and not self.optimizer.state and _is_torch_adam(self.optimizer):
            self._init_optimizer_states_with_dummy_values()
        return sharded_state_dict(self, model_sharded_state_dict, is_loading, *args, **kwargs)

    return wrapper


def _with_a_step_for_all(sharded_state_dict):
    @functools.wraps(sharded_state_dict)
    def wrapper(self, *args, **kwargs):
        adams = [each.optimizer for each in self.chained_optimizers if _is_torch_adam(each.optimizer)]
        steps = [state["step"] for adam in adams for state in adam.state.values()]
        for adam in adams:
            if not any(group["params"] for group in adam.param_groups):
                # Megatron reads the step of a checkpoint from any state; this one belongs to no parameter.
                adam.state["step"] = {"step": steps[0].clone() if steps else torch.zeros(())}
        return sharded_state_dict(self, *args, **kwargs)

    return wrapper


def _with_own_steps(load_state_dict):
    @functools.wraps(load_state_dict)
    def wrapper(self, state_dict):
        load_state_dict(self, state_dict)
        if _is_torch_adam(self.optimizer):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    return wrapper


def _without_step(set_states):
    @functools.wraps(set_states)
    def wrapper(self, model_param, tensors):
        return set_states(self, model_param, {"step": None, **tensors})

    return wrapper


def _fp32_first(build_optimizer_group_ranges):
    @functools.wraps(build_optimizer_group_ranges.__func__)
    def wrapper(cls, param_groups, gbuf_ranges):
        places, ranges = build_optimizer_group_ranges.__func__(cls, param_groups, gbuf_ranges)
        for index, group in enumerate(ranges):
            group["params"].sort(key=lambda parameter: parameter.dtype != torch.float32)
            places.update((parameter, (index, place)) for place, parameter in enumerate(group["params"]))
        return places, ranges

    return classmethod(wrapper)


@dataclass(frozen=True)
class Repair:
    """One method of an optimizer, what wraps it, and what goes wrong without."""

    owner: type
    attribute: str
    wrap: Callable[[Any], Any]
    reason: str

    def apply(self) -> None:
        """Wrap the method."""
        setattr(self.owner, self.attribute, self.wrap(vars(self.owner)[self.attribute]))


REPAIRS = (
    Repair(
        DistributedOptimizer,
        "sharded_param_state_fully_reshardable",
        _of_own_range,
        "gathers the states of all data-parallel ranks in the host memory of each, and slices them, which lack the "
        "padding between buckets, with offsets that count it: every parameter after a padded bucket is stored "
        "shifted, fp32 master weights included (upstream pull request 5077)",
    ),
    Repair(
        DistributedOptimizer,
        "load_parameter_state_from_fully_reshardable",
        _into_own_range,
        "takes the states of all data-parallel ranks, of which a rank needs its own range",
    ),
    Repair(
        DistributedOptimizer,
        "_build_optimizer_group_ranges",
        _fp32_first,
        "a group of a bf16 or fp16 model that holds fp32 parameters too (importance modules) steps with those in "
        "front, while the index by which states are saved and loaded keeps the order of the buffers: parameters are "
        "saved with each other's states, or saving raises where their sizes differ",
    ),
    Repair(
        DistributedOptimizer,
        "sharded_state_dict",
        _with_state_before_load,
        "torch's Adam (no Transformer Engine, no apex) has step counters only after its first step: loading fails on "
        "an assertion without them",
    ),
    Repair(
        DistributedOptimizer,
        "_set_main_param_and_optimizer_states",
        _without_step,
        "torch's Adam has a step counter for each parameter, checkpoints hold one for all: loading fails on a key",
    ),
    Repair(
        DistributedOptimizer,
        "load_state_dict",
        _with_own_steps,
        "gives torch's Adam one shared step counter, which then advances by the number of parameters in each step",
    ),
    Repair(
        ChainedOptimizer,
        "sharded_state_dict",
        _with_a_step_for_all,
        "saving fails on an assertion where torch's Adam has no parameters: the experts' on a pipeline stage without",
    ),
)
_applied: set[Repair] = set()


def install() -> None:
    """Apply all repairs; repeated calls are harmless."""
    for repair in REPAIRS:
        if repair not in _applied:
            repair.apply()
            _applied.add(repair)
