"""Launches and waits of one mixture layer, part by part, beside Megatron's; see `operator_counts`.

The layer is that of Ling-mini-2.0 in its routing: 256 experts in 8 groups, top-8, sigmoid scores with expert bias, one
balance loss per sequence, bf16. Ours has 8 to 12 slots and all that pretrain/configs/ling_mini_2_0_anyexperts.yaml
switches on. Hidden size and experts are narrow, which changes no count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter

from megatron_anyexperts.checks.operator_counts import OperatorCounts, count_operators
from megatron_anyexperts.moe.config import AnyExpertsConfig
from megatron_anyexperts.moe.layer import AnyExpertsMoELayer
from megatron_anyexperts.moe.metrics import RoutingTracker, install_metrics
from megatron_anyexperts.moe.quotas import as_on_gpu
from megatron_anyexperts.moe.router import AnyExpertsRouter

HIDDEN, EXPERTS, TOKENS, CAP_RANKS = 64, 256, 32, 8
OURS = {
    "anyexperts_k_min": 8,
    "anyexperts_k_max": 12,
    "anyexperts_target_slots": 8.2,
    "anyexperts_rho_max": 0.2,
    "anyexperts_target_real": 7.2,
    "anyexperts_alpha": 0.1,
    "anyexperts_learn_alpha": True,
    "anyexperts_spread_loss_coeff": 0.01,
}


@dataclass(frozen=True)
class Counted:
    """Counts of one part of a layer; `backward` is None for what has none."""

    forward: OperatorCounts
    backward: OperatorCounts | None


def ling_config(**options) -> AnyExpertsConfig:
    """Configuration of the layer."""
    return AnyExpertsConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        ffn_hidden_size=8,
        moe_ffn_hidden_size=8,
        num_moe_experts=EXPERTS,
        moe_router_topk=8,
        moe_router_num_groups=8,
        moe_router_group_topk=4,
        moe_router_score_function="sigmoid",
        moe_router_topk_scaling_factor=2.5,
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=1e-4,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        gated_linear_unit=True,
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16,
        bf16=True,
        gradient_accumulation_fusion=False,
        **options,
    )


def build(kind: type[MoELayer], config: AnyExpertsConfig) -> MoELayer:
    """A layer of `kind`, as layer 1."""
    spec = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    router = TopKRouter if kind is MoELayer else AnyExpertsRouter
    groups = get_default_pg_collection()
    with count_operators():  # so that what it keeps on the host is known to be there
        layer = kind(config, replace(spec.keywords["submodules"], router=router), layer_number=1, pg_collection=groups)
    layer.set_layer_number(1)
    return layer


def count_stock() -> dict[str, Counted]:
    """Router, and dispatch with combine, of Megatron's layer."""
    layer, hidden_SBH = build(MoELayer, ling_config(anyexperts_alpha=0.0, anyexperts_stock_moe=True)), _hidden()
    with count_operators() as router:
        gates_TE, map_TE = layer.router(hidden_SBH)
    backward = _backward(gates_TE)
    dispatcher = layer.token_dispatcher
    gates_TE = gates_TE.detach().requires_grad_()
    with count_operators() as dispatch:
        slots, probs = dispatcher.dispatch_preprocess(hidden_SBH, map_TE, gates_TE)
        slots, probs = dispatcher.token_dispatch(slots, probs)
        slots, _, probs = dispatcher.dispatch_postprocess(slots, probs)
        output = dispatcher.combine_preprocess(_Experts.apply(slots, probs))
        output = dispatcher.combine_postprocess(dispatcher.token_combine(output))
    return {"router": Counted(router, backward), "dispatch": Counted(dispatch, _backward(output))}


def count_ours(**options) -> dict[str, Counted]:
    """Router, dispatch with combine and virtual slots, and figures, of our layer.

    With `anyexperts_dispatch_eps` as if there were `CAP_RANKS` expert ranks, some of them over the cap, and in the way
    of a GPU.
    """
    config, capped = ling_config(**OURS, **options), "anyexperts_dispatch_eps" in options
    layer, hidden_SBH = build(AnyExpertsMoELayer, config), _hidden()
    if capped:
        layer.dispatcher.eps, layer.dispatcher.cap_ranks = config.anyexperts_dispatch_eps, CAP_RANKS
    layer.router.needs_fallback = capped
    tracker = install_metrics(config)
    with torch.no_grad():
        importance_T, _ = layer.importance(hidden_SBH)
        layer.router(hidden_SBH, None, importance_T)  # what is made once
    importance_T = importance_T.requires_grad_()
    with count_operators() as router:
        decision = layer.router(hidden_SBH, None, importance_T)
    backward = _backward(decision.gates_TE, decision.virtual_gate_T)
    hidden_TH = hidden_SBH.view(-1, HIDDEN)
    decision = replace(
        decision,
        gates_TE=decision.gates_TE.detach().requires_grad_(),
        virtual_gate_T=decision.virtual_gate_T.detach().requires_grad_(),
        fallback_gates_TE=decision.fallback_gates_TE.detach().requires_grad_() if capped else None,
    )
    with as_on_gpu(), count_operators() as dispatch:
        sent = layer.dispatcher.dispatch(hidden_TH, decision)
        output_NH = _Experts.apply(sent.expert_input, sent.expert_probs)
        output_TH = layer.combine(output_NH, sent, hidden_TH, decision)
    counted = {"router": Counted(router, backward), "dispatch": Counted(dispatch, _backward(output_TH))}
    return counted | {"figures": Counted(_count_figures(tracker, decision, sent.load), None)}


def _count_figures(tracker: RoutingTracker, decision, load) -> OperatorCounts:
    kinds_T = torch.zeros(TOKENS, dtype=torch.int8)
    with torch.no_grad(), count_operators() as figures:
        tracker.tallies["train"].add(1, kinds_T, decision, load)
    return figures


def _hidden() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(TOKENS, 1, HIDDEN, dtype=torch.bfloat16, requires_grad=True)


def _backward(*outputs: torch.Tensor) -> OperatorCounts:
    gradients = [torch.randn_like(output) for output in outputs]
    with count_operators() as counts:
        torch.autograd.backward(outputs, gradients)
    return counts


class _Experts(torch.autograd.Function):
    """Stands for the experts, without an operator of its own."""

    @staticmethod
    def forward(ctx, slots_NH, probs_N):
        ctx.save_for_backward(probs_N)
        return slots_NH.view_as(slots_NH)

    @staticmethod
    def backward(ctx, gradient_NH):
        (probs_N,) = ctx.saved_tensors
        return gradient_NH, torch.empty_like(probs_N)
