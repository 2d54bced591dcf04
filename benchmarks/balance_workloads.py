"""Skewed routing for the balance benchmark, and the least gate mass that any assignment under a cap loses."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_anyexperts.moe.decision import RoutingDecision
from megatron_anyexperts.moe.prices import Offers, find_prices
from megatron_anyexperts.moe.quotas import slot_cap

WORKLOADS = (
    "balanced",
    "hot experts",
    "hot rank",
    "spread hot experts",
    "ragged sources",
    "an empty rank",
    "rotating hotspot",
    "burst",
    "correlated tokens",
)


@dataclass(frozen=True)
class Setting:
    """One expert-parallel size: `ranks` sources of about `tokens` tokens each, top-`k` of `experts`."""

    ranks: int
    experts: int
    k: int
    tokens: int

    @classmethod
    def of(cls, ranks: int) -> "Setting":
        return cls(ranks, 16, 4, 1024) if ranks < 8 else cls(ranks, 256, 8, max(64, 4096 // ranks))


def logits(setting: Setting, workload: str, step: int, source: int) -> Tensor:
    """[T, E] router logits of one source: unit noise, plus what makes the workload skewed."""
    generator = torch.Generator().manual_seed(1_000_003 * step + 1009 * source + WORKLOADS.index(workload))
    local = setting.experts // setting.ranks
    tokens = setting.tokens
    if workload == "ragged sources":
        tokens = tokens // 4 + tokens * 3 * source // (2 * max(1, setting.ranks - 1))
    if workload == "an empty rank" and source == 0:
        tokens = 0
    push_E = torch.zeros(setting.experts)
    if workload in ("hot experts", "ragged sources", "an empty rank"):
        push_E[: setting.experts // 8] = 1.0
    elif workload == "hot rank":
        push_E[:local] = 1.5
    elif workload == "spread hot experts":
        push_E[::8] = 1.0
    elif workload == "rotating hotspot":
        hot = step % setting.ranks * local
        push_E[hot : hot + local] = 1.5
    elif workload == "burst" and step == 1:
        push_E[:local] = 4.0
    elif workload == "correlated tokens":
        push_E = 2.0 * torch.randn(setting.experts, generator=torch.Generator().manual_seed(step))
    return torch.randn(tokens, setting.experts, generator=generator) + push_E


def route(logits_TE: Tensor, k: int, bias_E: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Sigmoid scores and the routing map of their top-k; the bias only selects."""
    score_TE = torch.sigmoid(logits_TE)
    chosen = (score_TE + bias_E).topk(k, dim=1).indices
    return score_TE, torch.zeros_like(score_TE, dtype=torch.bool).scatter_(1, chosen, True)


def decision_of(setting: Setting, workload: str, step: int, source: int) -> RoutingDecision:
    score_TE, routed_TE = route(logits(setting, workload, step, source), setting.k)
    importance_T = score_TE.mean(1)
    slots_T = torch.full_like(importance_T, setting.k, dtype=torch.int64)
    return RoutingDecision(
        score_TE * routed_TE, routed_TE, None, importance_T, slots_T, score_TE * ~routed_TE, torch.ones_like(routed_TE)
    )


def most_gate_mass(gates_NE: Tensor, slots_N: Tensor, cap: int, price_P: Tensor, rounds: int = 60) -> float:
    """At least what any assignment of `slots_N` experts to the tokens and `cap` slots to a rank can receive.

    Any prices of the ranks' places give such a bound: what the tokens gain by choosing at these prices, and the prices
    of all places. From `price_P` they are lowered and raised (Rprop) to make it small; it then equals the linear
    program's value.
    """
    ranks = len(price_P)
    local, k = gates_NE.shape[1] // ranks, int(slots_N.max())
    beyond_NK = torch.arange(k) >= slots_N.unsqueeze(1)
    step_P = torch.full((ranks,), 0.02 * (price_P.max().item() or 1.0))
    sign_P, least = torch.zeros(ranks), float("inf")
    for _ in range(rounds):
        net_NK, expert_NK = (gates_NE - price_P.repeat_interleave(local)).topk(k, dim=1)
        net_NK = net_NK.masked_fill(beyond_NK, 0)
        gain = net_NK.clamp_min(0).sum(dtype=torch.float64) + cap * price_P.sum(dtype=torch.float64)
        least = min(least, gain.item())
        load_P = torch.bincount((expert_NK // local)[net_NK > 0], minlength=ranks)
        excess_P = (load_P - cap).masked_fill((price_P == 0) & (load_P < cap), 0)
        turned_P, sign_P = sign_P * excess_P.sign(), excess_P.sign().float()
        step_P = torch.where(turned_P > 0, 1.3 * step_P, torch.where(turned_P < 0, 0.5 * step_P, step_P)).clamp_max(0.1)
        price_P = (price_P + sign_P * step_P).clamp_min(0)
    return least


def least_lost(setting: Setting, workload: str, step: int, eps: float) -> float:
    """Gate mass that the best assignment of all sources' tokens under the cap loses."""
    decisions = [decision_of(setting, workload, step, source) for source in range(setting.ranks)]
    routed = sum(decision.gates_TE.double().sum().item() for decision in decisions)
    slots = sum(decision.routing_map_TE.sum() for decision in decisions)
    gates_NE = torch.cat([decision.gates_TE + decision.fallback_gates_TE for decision in decisions])
    cap = slot_cap(slots, setting.ranks, eps).item()
    evenly = [replace(decision, importance_T=torch.ones_like(decision.importance_T)) for decision in decisions]
    offers = [Offers.of(decision, setting.k, False) for decision in evenly]

    def count(price_P: Tensor, counts_PB: Tensor) -> None:
        for each in offers:
            each.count(price_P, counts_PB)

    price_P = find_prices(count, setting.ranks, cap, slots.item(), gates_NE.device)
    slots_N = torch.full((len(gates_NE),), setting.k)
    return routed - most_gate_mass(gates_NE, slots_N, cap, price_P, rounds=10)
