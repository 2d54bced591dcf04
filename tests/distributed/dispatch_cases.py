"""Routing cases and a dense reference that the dispatch tests share."""

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_anyexperts.moe.config import AnyExpertsConfig
from megatron_anyexperts.moe.decision import RoutingDecision
from megatron_anyexperts.moe.dispatcher import SlotDispatcher

HIDDEN = 8


def config(experts: int, k_max: int, **options) -> AnyExpertsConfig:
    return AnyExpertsConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=experts,
        moe_router_topk=k_max,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        anyexperts_k_min=1,
        anyexperts_k_max=k_max,
        **options,
    )


def make_dispatcher(cfg: AnyExpertsConfig) -> SlotDispatcher:
    groups = ProcessGroupCollection.use_mpu_process_groups(["ep", "expt_tp", "tp_ep"])
    local = cfg.num_moe_experts // groups.ep.size()
    first = groups.ep.rank() * local
    return SlotDispatcher(cfg, local, list(range(first, first + local)), groups)


@dataclass
class Case:
    """Leaf tensors of one rank's tokens, and the routing decision made of them."""

    hidden: Tensor
    logits: Tensor
    decision: RoutingDecision


def make_case(
    seed: int, tokens: int, experts: int, k_max: int, skew: float = 0.0, dtype: torch.dtype = torch.float32
) -> Case:
    """Tokens with 1..k_max slots each; `skew` pulls them toward the first experts."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    logits = torch.randn(tokens, experts, generator=generator, dtype=dtype)
    logits = (logits - skew * torch.arange(experts) / experts).to(dtype).requires_grad_()
    slots = torch.randint(1, k_max + 1, (tokens,), generator=generator)
    rank = logits.detach().argsort(dim=1, descending=True).argsort(dim=1)
    routed = rank < slots[:, None]
    score = torch.sigmoid(logits)
    decision = RoutingDecision(
        gates_TE=score * routed,
        routing_map_TE=routed,
        virtual_gate_T=None,
        importance_T=torch.rand(tokens, generator=generator),
        slots_T=slots,
        fallback_gates_TE=score * ~routed,
        eligible_TE=torch.ones_like(routed),
    )
    return Case(hidden, logits, decision)


def expert_weights(experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(experts, HIDDEN, HIDDEN, generator=generator, dtype=dtype)


def run_experts(dispatched, weights_LHH: Tensor) -> Tensor:
    """Apply each local expert, tanh(x W), to its slots and multiply by the gates, as Megatron's experts do."""
    chunks = dispatched.expert_input.split(dispatched.tokens_per_expert.tolist())
    outputs = [torch.tanh(x @ w) for x, w in zip(chunks, weights_LHH, strict=True)]
    return torch.cat(outputs) * dispatched.expert_probs[:, None].to(dispatched.expert_input.dtype)


def dense(hidden: Tensor, gates_TE: Tensor, weights_EHH: Tensor) -> Tensor:
    """Every expert on every token, weighted by its gate."""
    outputs_ETH = torch.tanh(torch.einsum("th,ehk->etk", hidden, weights_EHH))
    return torch.einsum("te,eth->th", gates_TE, outputs_ETH)
