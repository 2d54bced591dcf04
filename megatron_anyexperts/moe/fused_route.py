"""Routing from logits to gates by one kernel in each direction: `route_kernels` as an operator with a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_anyexperts.moe.slots import cap_steps, trim_to_budget

if TYPE_CHECKING:
    from megatron_anyexperts.moe.config import AnyExpertsConfig

TOKENS = 4
"""Of one program."""


@dataclass(frozen=True)
class FusedRoute:
    """What the kernel leaves; shapes as in `AnyExpertsRouter`.

    Attributes:
        gates_TE: differentiable, like `virtual_gate_T`, `probs_TE` and `sums`; dtype of the logits.
        map_TE: bool, real slots in use.
        virtual_gate_T: summed gates of virtual slots; 0 without virtual columns.
        probs_TE: fp32, scores of real columns that sum to 1 per token, 0 for tokens that take no part; empty unless
            asked for.
        sums: fp32 [10], over the tokens that take part: see `route_kernels.SUMS`.
        importance_T, soft_T, slots_T: importance as used, continuous slots, slots (int64, 0 for who takes no part).
        weight_T, valid_T, broken_T: see `TokenWeights`, and which tokens are not finite.
    """

    gates_TE: Tensor
    map_TE: Tensor
    virtual_gate_T: Tensor
    probs_TE: Tensor
    sums: Tensor
    importance_T: Tensor
    soft_T: Tensor
    slots_T: Tensor
    weight_T: Tensor
    valid_T: Tensor
    broken_T: Tensor


@dataclass(frozen=True)
class Learns:
    """What a microbatch asks of the kernels beyond gates and slots.

    Attributes:
        probs: whether `probs_TE` is needed, for balance losses.
        z_loss: whether the sum of the z-loss is.
        budget: whether slots are trimmed to the budget.
        centred_over: ranks over which the gates' gradient of importance is centred; None: it is not.
    """

    probs: bool = False
    z_loss: bool = False
    budget: bool = False
    centred_over: torch.distributed.ProcessGroup | None = None


def route(
    config: AnyExpertsConfig,
    logits_TC: Tensor,
    importance_T: Tensor,
    mask_T: Tensor | None,
    control: tuple[Tensor, Tensor],
    expert_bias: Tensor | None,
    learns: Learns,
) -> FusedRoute:
    """Route T tokens; the definition is `AnyExpertsRouter.decide`.

    Args:
        logits_TC: [T, at least E + V], real columns first; rows may be strided.
        importance_T: fp32.
        mask_T: bool, true for padding, or fp32 weights; None: every token takes part.
        control: slot offset and virtual bias, fp32 [1] each.
        expert_bias: [E] or None.
        learns: what the losses and the gradient need.
    """
    settings = [
        config.num_moe_experts, config.anyexperts_virtual_experts, config.anyexperts_max_virtual_slots,
        config.anyexperts_k_min, config.anyexperts_k_max, config.moe_router_num_groups or 1,
        config.moe_router_group_topk or 0,
        config.moe_router_topk // config.moe_router_group_topk if config.moe_router_group_topk else 0,
        _score(config), ("fractional", "straight_through", "none").index(config.anyexperts_slot_gradient),
        int(learns.probs), int(learns.z_loss),
    ]  # fmt: skip
    if _score(config) < 2:
        expert_bias = None
    steps = cap_steps(config.anyexperts_k_max, config.anyexperts_rho_max, logits_TC.device)
    scale = config.moe_router_topk_scaling_factor or 1.0
    slots_T = _trimmed(config, logits_TC, importance_T, mask_T, control[0], settings) if learns.budget else None
    given = (mask_T, slots_T, *control, expert_bias, *steps)
    return FusedRoute(*_Route.apply(logits_TC, importance_T, given, settings, scale, learns.centred_over))


def _trimmed(config, logits_TC, importance_T, mask_T, offset, settings) -> Tensor:
    given = (logits_TC.detach(), importance_T.detach(), mask_T, offset)
    slots_T, clean_T, valid_T = torch.ops.anyexperts.token_slots(*given, settings)
    slots = config.anyexperts_budget_slack * config.anyexperts_target_slots
    budget = (slots * valid_T.sum(dtype=torch.float64)).floor().long()
    return trim_to_budget(slots_T, clean_T, config.anyexperts_k_min, budget)


def _score(config: AnyExpertsConfig) -> int:
    kind = config.moe_router_score_function
    if kind == "softmax":
        return int(config.moe_router_pre_softmax)
    return 2 if kind == "sigmoid" else 3


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TC, importance_T, given, settings, scale, centred_over):
        (gates, mapped, virtual_gate, probs, partial, clean, soft, slots, weight, valid, broken, virtual_used, last) = (
            torch.ops.anyexperts.route(logits_TC, importance_T, *given, settings, scale)
        )
        sums = partial.sum(0)
        saved = (logits_TC, clean, soft, slots, weight, broken, mapped, virtual_used, last, given[2])
        ctx.save_for_backward(*saved, valid, sums)
        ctx.settings, ctx.scale, ctx.centred_over = settings, scale, centred_over
        ctx.mark_non_differentiable(mapped, clean, soft, slots, weight, valid, broken)
        ctx.set_materialize_grads(False)
        return gates, mapped, virtual_gate, probs, sums, clean, soft, slots, weight, valid, broken

    @staticmethod
    def backward(ctx, d_gates, _map, d_virtual_gate, d_probs, d_sums, *_):
        *saved, valid, sums = ctx.saved_tensors
        d_logits, d_importance, from_gates = torch.ops.anyexperts.route_backward(
            saved, d_gates, d_virtual_gate, d_probs, d_sums, ctx.settings, ctx.scale, ctx.centred_over is not None
        )
        if ctx.centred_over is not None:
            total_2 = torch.stack((from_gates.sum(), sums[4]))
            if ctx.centred_over.size() > 1:
                torch.distributed.all_reduce(total_2, group=ctx.centred_over)
            d_importance -= total_2[0] / total_2[1].clamp(min=1) * valid
        return d_logits, d_importance, None, None, None, None


def _power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _mask(mask_T: Tensor | None) -> int:
    return 0 if mask_T is None else 1 if mask_T.dtype == torch.bool else 2


def _token_slots(logits_TC, importance_T, mask_T, offset, settings):
    from megatron_anyexperts.moe import slots_kernel

    experts, virtual, _, k_min, k_max, *_, gradient, _, _ = settings
    tokens, columns = len(logits_TC), experts + virtual
    slots, clean, valid = (
        logits_TC.new_empty(tokens, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.bool)
    )
    if tokens:
        slots_kernel.token_slots[(-(-tokens // TOKENS),)](
            logits_TC, importance_T, logits_TC if mask_T is None else mask_T, offset, slots, clean, valid, tokens,
            logits_TC.stride(0), C=columns, C2=_power(columns), K_MIN=k_min, K_MAX=k_max, GRADIENT=gradient,
            MASK=_mask(mask_T), TOKENS=TOKENS,
        )  # fmt: skip
    return slots, clean, valid


def _route(
    logits_TC, importance_T, mask_T, slots_T, offset, virtual_bias, expert_bias, real_first, virtual_first, settings,
    scale,
):  # fmt: skip
    from megatron_anyexperts.moe import route_kernels

    experts, virtual, most_virtual, k_min, k_max, groups, keep, per, score, gradient, with_probs, z_loss = settings
    tokens = len(logits_TC)
    new = logits_TC.new_empty
    programs = -(-tokens // TOKENS)
    gates_TE, map_TE = new(tokens, experts), new(tokens, experts, dtype=torch.bool)
    probs = new((tokens, experts) if with_probs else (0,), dtype=torch.float32)
    virtual_gate_T, virtual_used = new(tokens), new(tokens, max(1, virtual), dtype=torch.bool)
    clean, soft, weight = (new(tokens, dtype=torch.float32) for _ in range(3))
    slots, last = new(tokens, dtype=torch.int64), new(tokens, dtype=torch.int32)
    valid, broken = (new(tokens, dtype=torch.bool) for _ in range(2))
    partial = new(programs, len(route_kernels.SUMS), dtype=torch.float32)
    if programs:
        route_kernels.route_forward[(programs,)](
            logits_TC, importance_T, *(logits_TC if each is None else each for each in (mask_T, slots_T)), offset,
            virtual_bias, logits_TC if expert_bias is None else expert_bias, real_first, virtual_first,
            gates_TE, map_TE, probs, virtual_gate_T, virtual_used, last, clean, soft, slots, weight, valid, broken,
            partial, tokens, logits_TC.stride(0),
            E=experts, E2=_power(experts), V=virtual, V2=_power(virtual), MOST_VIRTUAL=most_virtual, K_MIN=k_min,
            K_MAX=k_max, G=groups, G2=_power(groups), KEEP=keep, PER=per, SCORE=score, GRADIENT=gradient, SCALE=scale,
            MASK=_mask(mask_T), BIASED=expert_bias is not None, PROBS=bool(with_probs), TRIMMED=slots_T is not None,
            Z=bool(z_loss), TOKENS=TOKENS,
        )  # fmt: skip
    return (
        gates_TE, map_TE, virtual_gate_T, probs, partial, clean, soft, slots, weight, valid, broken, virtual_used, last
    )  # fmt: skip


def _route_backward(saved, d_gates, d_virtual_gate, d_probs, d_sums, settings, scale, centred):
    from megatron_anyexperts.moe import route_kernels

    logits_TC, clean, soft, slots, weight, broken, map_TE, virtual_used, last, offset = saved
    experts, virtual, _, k_min, k_max, _, _, _, score, gradient, with_probs, z_loss = settings
    tokens, columns = logits_TC.shape
    with_probs = bool(with_probs) and d_probs is not None
    d_gates, d_virtual_gate, d_sums = (
        each.contiguous() if each is not None else logits_TC.new_zeros(shape)
        for each, shape in ((d_gates, map_TE.shape), (d_virtual_gate, tokens), (d_sums, len(route_kernels.SUMS)))
    )
    d_probs = d_probs.contiguous() if with_probs else d_gates
    d_logits = torch.empty_like(logits_TC, memory_format=torch.contiguous_format)
    d_importance = torch.empty_like(clean)
    programs = -(-tokens // TOKENS)
    from_gates = clean.new_empty(programs if centred else 0)
    if tokens:
        route_kernels.route_backward[(programs,)](
            logits_TC, clean, soft, slots, weight, broken, map_TE, virtual_used, last, offset,
            d_gates, d_virtual_gate, d_probs, d_sums, d_logits, d_importance, from_gates,
            tokens, logits_TC.stride(0), d_logits.stride(0),
            E=experts, E2=_power(experts), V=virtual, V2=_power(columns - experts), COLUMNS=columns, K_MIN=k_min,
            K_MAX=k_max, SCORE=score, GRADIENT=gradient, SCALE=scale, PROBS=with_probs, Z=bool(z_loss),
            CENTRED=centred, TOKENS=TOKENS,
        )  # fmt: skip
    return d_logits, d_importance, from_gates


# Operators of torch, so that profilers and counters see a launch as such.
_library = torch.library.Library("anyexperts", "FRAGMENT")
_library.define(
    "route(Tensor logits, Tensor importance, Tensor? mask, Tensor? slots, Tensor offset, Tensor virtual_bias, "
    "Tensor? expert_bias, Tensor real_first, Tensor virtual_first, int[] settings, float scale) -> "
    f"({', '.join(['Tensor'] * 13)})"
)
_library.define(
    "route_backward(Tensor[] saved, Tensor? d_gates, Tensor? d_virtual_gate, Tensor? d_probs, Tensor? d_sums, "
    "int[] settings, float scale, bool centred) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "token_slots(Tensor logits, Tensor importance, Tensor? mask, Tensor offset, int[] settings) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.impl("token_slots", _token_slots, "CompositeExplicitAutograd")
_library.impl("route", _route, "CompositeExplicitAutograd")
_library.impl("route_backward", _route_backward, "CompositeExplicitAutograd")
