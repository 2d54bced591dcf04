"""Feedback once per optimizer step: slot offset, virtual bias and expert bias follow globally reduced counts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import rerun_state_machine
from megatron.core.distributed.finalize_model_grads import finalize_model_grads as stock_finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunState
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from megatron_anyexperts.moe.precision import KeepsPrecision

if TYPE_CHECKING:
    from megatron_anyexperts.moe.config import AnyExpertsConfig

# The offset is added to importance, which lies in (0, 1): beyond +-1 nothing changes any more.
OFFSET_LIMIT = 1.0
# exp(12) = 160 thousand to 1: beyond that a virtual column always or never wins.
VIRTUAL_BIAS_LIMIT = 12.0
# With fewer movable tokens than this share, the offset steps as if there were this many.
LEAST_MOVABLE = 0.1


def next_offset(
    offset: Tensor, tokens: Tensor, slots: Tensor, movable: Tensor, target: float, span: int, rate: float
) -> Tensor:
    """Return the slot offset after one step: a damped Newton step toward `target` mean slots.

    Moving the offset by d moves the mean by d * span * (share of tokens between k_min and k_max): that share is the
    slope, so the step is `rate` times the deviation over it.

    Args:
        offset: fp32, any shape; `tokens`, `slots`, `movable` have the same shape and hold the step's counts.
        movable: tokens whose continuous slot count is strictly inside the range.
        span: k_max - k_min.
    """
    count = tokens.clamp(min=1)
    slope = span * (movable / count).clamp(min=LEAST_MOVABLE)
    step = rate * (target - slots / count) / slope
    moved = (offset + step.clamp(-0.25, 0.25)).clamp(-OFFSET_LIMIT, OFFSET_LIMIT)
    return torch.where(tokens > 0, moved, offset).to(offset.dtype)


def next_virtual_bias(bias: Tensor, tokens: Tensor, real: Tensor, target: float, rate: float) -> Tensor:
    """Return the bias of the virtual columns after one step: up by `rate` per real slot above `target`.

    Args:
        bias: fp32 in logits, any shape; `tokens` and `real` (real slots) have the same shape.
    """
    step = (rate * (real / tokens.clamp(min=1) - target)).clamp(-1, 1)
    moved = (bias + step).clamp(-VIRTUAL_BIAS_LIMIT, VIRTUAL_BIAS_LIMIT)
    return torch.where(tokens > 0, moved, bias).to(bias.dtype)


class RouterControl(KeepsPrecision):
    """State and counters of one router's controllers; no parameters.

    Those of a router whose weight is frozen (`requires_grad`) stand still in training.

    Attributes:
        slot_offset: fp32 [1], persistent; added to importance.
        virtual_bias: fp32 [1], persistent; added to the virtual columns' logits for selection only.
        counts: int64 [4], this step's local tokens, slots, real slots and movable tokens; padding and non-finite tokens
            excluded.
        calibrating: count in evaluation too; see `calibration`.
    """

    def __init__(self, config: AnyExpertsConfig):
        super().__init__()
        self.config = config
        device = torch.cuda.current_device()
        self.register_buffer("slot_offset", torch.zeros(1, dtype=torch.float32, device=device))
        self.register_buffer("virtual_bias", torch.zeros(1, dtype=torch.float32, device=device))
        self.register_buffer("counts", torch.zeros(4, dtype=torch.int64, device=device), persistent=False)
        self.calibrating = False
        self._before: list[tuple[Tensor, Tensor]] = []

    @property
    def needs_counts(self) -> bool:
        """Whether there is a target to steer to."""
        return self.config.anyexperts_target_slots is not None or self.config.anyexperts_target_real is not None

    @torch.no_grad()
    def count(self, soft_T: Tensor, slots_T: Tensor, real_used_TK: Tensor, valid_T: Tensor) -> None:
        """Add one microbatch of local tokens.

        Args:
            soft_T: continuous slot count.
            slots_T: int64, slots; 0 for tokens that take no part.
            real_used_TK: bool, which of the token's real candidates are in use.
            valid_T: bool, the tokens that take part.
        """
        config = self.config
        if not self.needs_counts:
            return
        movable_T = (soft_T > config.anyexperts_k_min) & (soft_T < config.anyexperts_k_max) & valid_T
        self.add(torch.stack((valid_T.sum(), slots_T.sum(), real_used_TK.sum(), movable_T.sum())))

    @torch.no_grad()
    def add(self, counts: Tensor) -> None:
        """Add the `counts` of one microbatch, whole numbers of any dtype."""
        if not self.needs_counts:
            return
        config = self.config
        if not (self.calibrating or moves_controllers(config.finalize_model_grads_func)):
            raise RuntimeError(
                "nothing moves the controllers of dynamic slots, so anyexperts_target_slots and _real would not be "
                "kept: after the model is built, add\n"
                "    config.finalize_model_grads_func = with_controllers(config.finalize_model_grads_func)"
            )
        self.counts += counts.to(self.counts.dtype)

    def remember(self, expert_bias: Tensor | None) -> None:
        """Keep the state before an update, in case the rerun machine repeats the step."""
        state = [self.slot_offset, self.virtual_bias] + ([] if expert_bias is None else [expert_bias])
        self._before = [(tensor, tensor.clone()) for tensor in state]

    def keep_if(self, finite: Tensor) -> None:
        """Take the last update back unless `finite`, a bool scalar."""
        for tensor, before in self._before:
            tensor.copy_(torch.where(finite, tensor, before))

    def undo_if_rerunning(self) -> None:
        """Take the last update back while the rerun machine repeats its step: a repeat must see the same state."""
        if self._before and repeats_step():
            for tensor, before in self._before:
                tensor.copy_(before)
            self._before = []

    def _save_to_state_dict(self, *args, **kwargs):
        self.undo_if_rerunning()
        super()._save_to_state_dict(*args, **kwargs)


def repeats_step() -> bool:
    """Whether the rerun machine repeats a step, which must see what it saw before."""
    machine = rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE
    repeats = (RerunState.RERUNNING_IN_PLACE, RerunState.WILL_RERUN_FROM_CHECKPOINT)
    return machine is not None and machine.state in repeats


@torch.no_grad()
def update_controllers(model: list[torch.nn.Module]) -> None:
    """Move every training router's slot offset and virtual bias by this step's counts, then clear the counts.

    One all-reduce over the tensor, data and context parallel ranks for all layers of the pipeline stage, so the state
    stays one per layer and equal on all ranks.

    Args:
        model: model chunks of this rank.
    """
    routers = _routers(model)
    if not routers:
        return
    config = routers[0].config
    if config.anyexperts_target_slots is None and config.anyexperts_target_real is None:
        return
    counts_4L = torch.stack([router.control.counts for router in routers], dim=1)
    torch.distributed.all_reduce(counts_4L, group=routers[0].tp_dp_cp_group)
    tokens_L, slots_L, real_L, movable_L = counts_4L.double()
    span = config.anyexperts_k_max - config.anyexperts_k_min
    if config.anyexperts_target_slots is not None and span:
        offset_L = torch.cat([router.control.slot_offset for router in routers])
        moved_L = next_offset(
            offset_L, tokens_L, slots_L, movable_L, config.anyexperts_target_slots, span, config.anyexperts_slot_rate
        )
        for router, value in zip(routers, moved_L, strict=True):
            router.control.slot_offset.fill_(value)
    if config.anyexperts_target_real is not None:
        bias_L = torch.cat([router.control.virtual_bias for router in routers])
        moved_L = next_virtual_bias(
            bias_L, tokens_L, real_L, config.anyexperts_target_real, config.anyexperts_virtual_bias_rate
        )
        for router, value in zip(routers, moved_L, strict=True):
            router.control.virtual_bias.fill_(value)
    for router in routers:
        router.control.counts.zero_()


def _modules(model: list[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    return (module for chunk in model for module in get_attr_wrapped_model(chunk, "modules")())


def _routers(model: list[torch.nn.Module], always: bool = False) -> list[torch.nn.Module]:
    routers = [module for module in _modules(model) if isinstance(getattr(module, "control", None), RouterControl)]
    return [router for router in routers if always or router.training or router.control.calibrating]


@contextmanager
def calibration(model: list[torch.nn.Module]) -> Iterator[Callable[[], None]]:
    """Move the controllers of a model in evaluation mode to other targets, without training it.

    Yields:
        A function to call after each forward pass or batch of passes; it is collective and makes one controller step.
        A dozen steps reach a target for total slots, some dozens one for real slots.
    """
    routers = _routers(model, always=True)
    for router in routers:
        router.control.calibrating = True
        router.control.counts.zero_()
    try:
        yield lambda: update_controllers(model)
    finally:
        for router in routers:
            router.control.calibrating = False


def with_controllers(finalize: Callable[..., None] | None = None) -> Callable[..., None]:
    """A `finalize_model_grads_func` that moves the controllers after gradients were finalised.

    The layer puts one into its configuration; a loop that sets that field itself, as Megatron-Bridge does, calls this:
    `config.finalize_model_grads_func = with_controllers(config.finalize_model_grads_func)`.

    Args:
        finalize: what finalises gradients, with the signature of Megatron's; None: Megatron's own. One that moves the
            controllers already is returned as it is.
    """
    inner = stock_finalize_model_grads if finalize is None else finalize
    if moves_controllers(inner):
        return inner

    @functools.wraps(inner)
    def finalize_and_control(model, num_tokens=None, pg_collection=None, *args: Any, **kwargs: Any) -> None:
        _finalize(functools.partial(inner, model, num_tokens, pg_collection, *args, **kwargs), model, pg_collection)

    finalize_and_control.moves_controllers = True
    return finalize_and_control


def moves_controllers(finalize: Callable[..., None] | None) -> bool:
    """Whether a `finalize_model_grads_func` moves the controllers."""
    return getattr(finalize, "moves_controllers", False)


def _finalize(
    finalize: Callable[[], None], model: list[torch.nn.Module], pg_collection: ProcessGroupCollection | None
) -> None:
    """Finalise gradients, then move the controllers.

    Runs before the optimizer. A step whose gradients are not all finite, which an optimizer with a loss scale then
    skips, moves nothing: what overflowed may have been the hidden states that were routed. Runs again when the rerun
    machine repeats the step; routers then undo the first update before they route.
    """
    routers = _routers(model)
    for router in routers:
        router.control.remember(router.expert_bias)
    finalize()
    for router in routers:
        if _zero_mean(router):
            router.expert_bias -= router.expert_bias.mean()
    update_controllers(model)
    config = get_model_config(model[0])
    if config.moe_router_enable_expert_bias or config.anyexperts_target_slots or config.anyexperts_target_real:
        finite = gradients_are_finite(model, pg_collection)
        for router in routers:
            router.control.keep_if(finite)
    for module in _modules(model):
        if (end_step := getattr(module, "end_step", None)) is not None:
            end_step()


@torch.no_grad()
def gradients_are_finite(model: list[torch.nn.Module], pg_collection: ProcessGroupCollection | None = None) -> Tensor:
    """Return whether all gradients on all ranks are finite, a bool scalar; collective, without waiting for a GPU.

    Args:
        model: model chunks of this rank, gradients reduced.
        pg_collection: process groups; Megatron's global ones if None.
    """
    parameters = (parameter for chunk in model for parameter in chunk.parameters() if parameter.requires_grad)
    gradients = [gradient for p in parameters if (gradient := getattr(p, "main_grad", p.grad)) is not None]
    largest = torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)
    finite = largest.isfinite().to(torch.cuda.current_device(), torch.int32)
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp_dp_cp", "pp"])
    for group in (groups.tp_dp_cp, groups.pp):
        torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN, group=group)
    return finite.bool()


def _zero_mean(router) -> bool:
    if router.expert_bias is None or router.frozen_expert_bias or not router.weight.requires_grad:
        return False
    kind = router.config.anyexperts_expert_bias_update
    return kind == "zero_mean" or (kind == "auto" and bool(router.config.anyexperts_virtual_experts))
