"""From logical to physical experts: where each slot is computed when experts have copies.

A rank computes the `L` experts it owns and up to `R` copies of others: `L + R` *physical* experts (the term of
DeepSeek's EPLB), its own first. Slots choose logical experts; a plan of copies says which physical expert takes them.

Shapes: `T` local tokens, `E` logical experts, `P` expert ranks, `Q = P * (L + R)` physical experts, rank by rank, `S`
sources.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from megatron_anyexperts.moe.copies import CopyPlan
from megatron_anyexperts.moe.decision import RoutingDecision


@dataclass(frozen=True)
class PhysicalExperts:
    """A plan of copies, laid out as columns of a routing map.

    Attributes:
        expert_Q: int64, the logical expert; 0 where a place for a copy is free.
        owned_Q: bool, the expert itself and no copy.
        first_SQ: int64, how many of the source's slots for this expert go to physical experts before this one.
        slots_SQ: int64, slots that each source sends to it.
    """

    expert_Q: Tensor
    owned_Q: Tensor
    first_SQ: Tensor
    slots_SQ: Tensor

    def to(self, device: torch.device) -> PhysicalExperts:
        """The same on another device."""
        return PhysicalExperts(*(getattr(self, field.name).to(device) for field in fields(self)))

    def slots_of_copies(self, slots_Q: Tensor) -> Tensor:
        """int64 scalar, those of the slots that copies compute."""
        return slots_Q.masked_fill(self.owned_Q, 0).sum()

    def per_logical(self, slots_Q: Tensor, experts: int) -> Tensor:
        """int64 [E], slots of each logical expert, copies included."""
        return slots_Q.new_zeros(experts).index_add(0, self.expert_Q, slots_Q)


def lay_out(counts_SE: np.ndarray, ranks: int, copies_per_rank: int, plan: CopyPlan) -> PhysicalExperts:
    """Physical experts of a plan.

    Args:
        counts_SE: int64, the counts the plan was made of.
        ranks: expert ranks `P`.
        copies_per_rank: `R`, places for copies on a rank.
        plan: what `plan_copies` made of them.
    """
    sources, experts = counts_SE.shape
    local = experts // ranks
    width = local + copies_per_rank
    expert_E = np.arange(experts)
    home_E = expert_E // local * width + expert_E % local
    expert_Q, owned_Q = np.zeros(ranks * width, np.int64), np.zeros(ranks * width, bool)
    expert_Q[home_E], owned_Q[home_E] = expert_E, True
    first_SQ, slots_SQ = np.zeros((2, sources, ranks * width), np.int64)
    slots_SQ[:, home_E] = counts_SE

    copy_G = plan.rank_G != plan.expert_G // local
    column_G = home_E[plan.expert_G]
    taken_P = np.zeros(ranks, np.int64)
    for target in copy_G.nonzero()[0]:
        rank = plan.rank_G[target]
        column_G[target] = rank * width + local + taken_P[rank]
        taken_P[rank] += 1
    expert_Q[column_G] = plan.expert_G
    slots_SQ[:, column_G] = plan.flow_GS.T
    before_GS = plan.flow_GS.cumsum(0) - plan.flow_GS
    owner_G = np.searchsorted(plan.expert_G, plan.expert_G)  # an owner stands before its copies
    first_SQ[:, column_G] = (before_GS - before_GS[owner_G]).T
    return PhysicalExperts(*map(torch.from_numpy, (expert_Q, owned_Q, first_SQ, slots_SQ)))


def on_physical_experts(decision: RoutingDecision, experts: PhysicalExperts, source: int) -> RoutingDecision:
    """The same decision over physical experts: gates, map and fallbacks are [T, Q].

    The first tokens that chose an expert go to the first of its physical experts, as many as the plan says. A slot may
    be rerouted to experts themselves, not to copies.

    Args:
        decision: over logical experts.
        experts: on the device of the decision.
        source: the row of the plan that is this rank's.
    """
    expert_Q, first_Q = experts.expert_Q, experts.first_SQ[source]
    chosen_TQ = decision.routing_map_TE.index_select(1, expert_Q)
    position_TQ = (decision.routing_map_TE.cumsum(0) - 1).index_select(1, expert_Q)
    map_TQ = chosen_TQ & (position_TQ >= first_Q) & (position_TQ < first_Q + experts.slots_SQ[source])
    physical = replace(
        decision, gates_TE=decision.gates_TE.index_select(1, expert_Q) * map_TQ, routing_map_TE=map_TQ
    )
    if decision.fallback_gates_TE is None:
        return physical
    return replace(
        physical,
        fallback_gates_TE=decision.fallback_gates_TE.index_select(1, expert_Q) * experts.owned_Q,
        eligible_TE=decision.eligible_TE.index_select(1, expert_Q) & ~chosen_TQ & experts.owned_Q,
    )
