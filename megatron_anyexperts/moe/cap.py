"""Slots under the cap on expert ranks: at prices that all sources find together, and by quotas where these fall short.

1. `find_prices`: a few rounds, each adding up one matrix of whole numbers over the sources. Each token then takes its
   best experts at these prices, which keeps its number of slots.
2. The counts of what was taken tell whether every rank is within the cap. Mostly it is: done.
3. Otherwise (values that no price can divide, groups that leave tokens no choice) quotas and room by
   `plan_dispatch`: sources give up what is over quota and look for places, until no rank with room is of use to
   anyone. What is left becomes virtual.

A GPU is waited for once where step 2 ends it; the caller has waited for the demand before, to know that the cap acts.
Shapes: `T` local tokens, `E` experts, `P` expert ranks, `S` sources.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_anyexperts.moe.decision import RoutingDecision
from megatron_anyexperts.moe.prices import Offers, find_prices
from megatron_anyexperts.moe.quotas import plan_dispatch, share_wanted, slot_cap
from megatron_anyexperts.moe.reroute import FittedSlots, at_prices, fit_to_plan, place, settled, wanted, with_gates


@dataclass(frozen=True)
class Sources:
    """How the sources of a step work together. A process has one of them, or, to try things out, all.

    Attributes:
        gather: int64 [n] of each source of this process -> [S, n] of all.
        add: adds up int64 over processes, in place.
        own: rows of this process.
    """

    gather: Callable[[list[Tensor]], Tensor]
    add: Callable[[Tensor], Tensor]
    own: range

    @classmethod
    def all_here(cls, number: int) -> "Sources":
        """All sources in one process."""
        return cls(torch.stack, lambda counts: counts, range(number))


@dataclass(frozen=True)
class UnderCap:
    """What the sources of this process send, and slots of every source per expert, int64, here and on the host.

    `settled` says whether prices were enough; otherwise slots may have become virtual.
    """

    fitted: list[FittedSlots]
    counts_SE: Tensor
    known_SE: Tensor
    settled: bool


def fit(
    decisions: list[RoutingDecision], cap: int, slots: int, ranks: int, k_max: int, sources: Sources, fused: bool
) -> UnderCap:
    """The slots of this process's sources when no rank may receive more than `cap`.

    Args:
        decisions: routing of each source's tokens; `fallback_gates_TE` and `eligible_TE` must be there.
        cap: from `slot_cap`.
        slots: real slots of all sources.
        ranks: P.
        k_max: most real slots of a token.
        sources: which they are, and the others.
        fused: use kernels.

    Raises:
        ValueError: a decision carries no fallback gates.
    """
    if any(decision.fallback_gates_TE is None for decision in decisions):
        raise ValueError(
            "the dispatch cap needs fallback_gates_TE to reroute slots, but the routing decision has none; let the "
            "router compute them whenever anyexperts_dispatch_eps is finite"
        )
    with torch.no_grad():
        offers = [Offers.of(decision, k_max, fused) for decision in decisions]

        def count(price_P: Tensor, counts_PB: Tensor) -> None:
            for each in offers:
                each.count(price_P, counts_PB)
            sources.add(counts_PB)

        price_P = find_prices(count, ranks, cap, slots, offers[0].value_TE.device, fused)
        chosen, rerouted = zip(*(each.choose(price_P) for each in offers), strict=True)
        counts_SE = sources.gather([map_TE.sum(0) for map_TE in chosen])
        known_SE = counts_SE.cpu()
    if _per_rank(known_SE, ranks).sum(0).max() <= cap:
        fitted = [settled(*each) for each in zip(decisions, chosen, rerouted, strict=True)]
        return UnderCap(fitted, counts_SE, known_SE, True)
    fitted_TE, counts_SE = _by_quotas(decisions, chosen, counts_SE, cap, k_max, ranks, sources)
    fitted = [with_gates(*pair, k_max) for pair in zip(decisions, fitted_TE, strict=True)]
    return UnderCap(fitted, counts_SE, counts_SE.cpu(), False)


@torch.no_grad()
def _by_quotas(
    decisions: list[RoutingDecision],
    chosen: tuple[Tensor, ...],
    counts_SE: Tensor,
    cap: int,
    k_max: int,
    ranks: int,
    sources: Sources,
) -> tuple[list[Tensor], Tensor]:
    """Slots and counts within the cap, from those taken at prices.

    A source may lack room that others leave unused: it is shared anew among those that can use it, until nobody can.
    Each turn fills at least one place; mostly there is none to take.
    """
    priced = [at_prices(*pair) for pair in zip(decisions, chosen, strict=True)]
    plan = plan_dispatch(_per_rank(counts_SE, ranks), cap)
    limits = [(plan.quota_SP[row], plan.room_SP[row]) for row in sources.own]
    fitted = [fit_to_plan(each, *limit, k_max) for each, limit in zip(priced, limits, strict=True)]
    while True:
        told = [
            torch.cat((map_TE.sum(0), wanted(each, map_TE, ranks)))
            for each, map_TE in zip(priced, fitted, strict=True)
        ]
        counts_SE, wanted_SP = sources.gather(told).split((counts_SE.shape[1], ranks), dim=1)
        room_SP = share_wanted(wanted_SP, plan.cap - _per_rank(counts_SE, ranks).sum(0))
        if not room_SP.any():
            return fitted, counts_SE
        fitted = [
            place(each, map_TE, room_SP[row], k_max)
            for each, map_TE, row in zip(priced, fitted, sources.own, strict=True)
        ]


def fit_sources(decisions: list[RoutingDecision], ranks: int, k_max: int, eps: float, fused: bool = False) -> UnderCap:
    """What `SlotDispatcher` makes of the decisions of all sources, in one process: for tests and benchmarks."""
    demand_SE = torch.stack([decision.routing_map_TE.sum(0) for decision in decisions])
    cap, slots = slot_cap(demand_SE.sum(), ranks, eps).item(), demand_SE.sum().item()
    if _per_rank(demand_SE, ranks).sum(0).max() <= cap:
        zero = demand_SE.new_zeros(())
        fitted = [settled(decision, decision.routing_map_TE, zero) for decision in decisions]
        return UnderCap(fitted, demand_SE, demand_SE, True)
    return fit(decisions, cap, slots, ranks, k_max, Sources.all_here(len(decisions)), fused)


def _per_rank(counts_SE: Tensor, ranks: int) -> Tensor:
    return counts_SE.reshape(len(counts_SE), ranks, -1).sum(2)
