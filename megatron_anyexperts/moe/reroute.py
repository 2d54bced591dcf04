"""Fit one source's slots to its share of the dispatch plan: keep, reroute, or make virtual.

A pure function of local tensors, with shapes that do not depend on the data: no synchronisation on a GPU.
Shapes: `T` local tokens, `E` experts, `P` expert ranks, `K` most slots of a token, `F` fallback candidates of a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_anyexperts.moe.decision import RoutingDecision

# Each round every token still owed slots proposes to its best open candidates. A rank that turns one away is full,
# so a further round only matters while several ranks fill up one after the other.
_ROUNDS = 4


@dataclass(frozen=True)
class FittedSlots:
    """A routing decision that respects the plan.

    Attributes:
        gates_TE: gates of the slots to send, 0 elsewhere; differentiable.
        routing_map_TE: bool, the slots to send.
        displaced_gate_T: summed gates of the token's slots that became virtual; differentiable.
        rerouted: int64 scalar, slots that changed their expert.
        displaced: int64 scalar, slots that became virtual.
    """

    gates_TE: Tensor
    routing_map_TE: Tensor
    displaced_gate_T: Tensor
    rerouted: Tensor
    displaced: Tensor


def fit_to_plan(decision: RoutingDecision, quota_P: Tensor, room_P: Tensor, k_max: int) -> FittedSlots:
    """Give up what is over quota, lowest priority first; reroute it where there is room, else make it virtual.

    The priority of a slot is importance x gate. A token that gives up `m` slots proposes its `m` best fallback experts
    on ranks with room; the proposals of all tokens compete by the same priority. Where fewer than `m` are
    accepted, the token's given-up slots with the smallest gates become virtual.

    Args:
        decision: routing of the local tokens; `fallback_gates_TE` must be there, 0 where an expert is not eligible.
        quota_P: int64, slots this source may send to each rank out of its own choice.
        room_P: int64, slots it may reroute to each rank.
        k_max: most real slots of a token.

    Raises:
        ValueError: the decision carries no fallback gates.
    """
    if decision.fallback_gates_TE is None:
        raise ValueError(
            "the dispatch cap needs fallback_gates_TE to reroute slots, but the routing decision has none; let the "
            "router compute them whenever anyexperts_dispatch_eps is finite"
        )
    with torch.no_grad():
        ranks = quota_P.shape[0]
        experts_per_rank = decision.gates_TE.shape[1] // ranks
        gate_TE = decision.gates_TE.masked_fill(~decision.routing_map_TE, -1)
        gate_TK, expert_TK = gate_TE.topk(min(k_max, gate_TE.shape[1]), dim=1)
        slot_TK = decision.routing_map_TE.gather(1, expert_TK)
        keep_TK = _best_per_rank(
            decision.importance_T[:, None] * gate_TK, slot_TK, expert_TK // experts_per_rank, quota_P
        )
        given_up_TK = slot_TK & ~keep_TK
        owed_T = given_up_TK.sum(1)

        open_TE = ~decision.routing_map_TE & (room_P > 0).repeat_interleave(experts_per_rank)
        offer_TE = decision.fallback_gates_TE.masked_fill(~open_TE, 0)
        offer_TF, candidate_TF = offer_TE.topk(min(2 * k_max, offer_TE.shape[1]), dim=1)
        accept_TF = _match(
            decision.importance_T[:, None] * offer_TF,
            offer_TF > 0,
            candidate_TF // experts_per_rank,
            owed_T,
            room_P,
        )
        accepted_T = accept_TF.sum(1)
        # Slots lie in descending order of their gates: the first `accepted_T` given-up ones found another expert.
        virtual_TK = given_up_TK & (given_up_TK.cumsum(1) > accepted_T[:, None])
        none_TE = torch.zeros_like(decision.routing_map_TE)
        kept_TE = none_TE.scatter(1, expert_TK, keep_TK)
        rerouted_TE = none_TE.scatter(1, candidate_TF, accept_TF)
        displaced_TE = none_TE.scatter(1, expert_TK, virtual_TK)
    return FittedSlots(
        gates_TE=torch.where(rerouted_TE, decision.fallback_gates_TE, decision.gates_TE * kept_TE),
        routing_map_TE=kept_TE | rerouted_TE,
        displaced_gate_T=(decision.gates_TE * displaced_TE).sum(1),
        rerouted=accepted_T.sum(),
        displaced=virtual_TK.sum(),
    )


def _by_rank_and_priority(priority: Tensor, valid: Tensor, rank: Tensor, ranks: int) -> Tensor:
    """Permutation of the flat entries: by rank, then by descending priority; invalid entries last, ties by position."""
    # The bits of a non-negative float32 order as the number does, so one integer sort does both keys.
    bits = priority.float().clamp_min(0).contiguous().view(torch.int32).long()
    return ((torch.where(valid, rank, ranks) << 32) - bits).flatten().sort(stable=True).indices


def _within(limit_P: Tensor, flag: Tensor, rank: Tensor) -> Tensor:
    """The first `limit_P` flagged entries of each rank; flat entries, the flagged ones sorted by rank."""
    count_P = torch.zeros_like(limit_P).scatter_add_(0, rank, flag.long())
    position = flag.cumsum(0) - 1 - (count_P.cumsum(0) - count_P)[rank]
    return flag & (position < limit_P[rank])


def _best_per_rank(priority_TK: Tensor, valid_TK: Tensor, rank_TK: Tensor, limit_P: Tensor) -> Tensor:
    """bool [T, K]: the `limit_P` valid entries of highest priority of each rank."""
    order = _by_rank_and_priority(priority_TK, valid_TK, rank_TK, limit_P.shape[0])
    best = _within(limit_P, valid_TK.flatten()[order], rank_TK.flatten()[order])
    return torch.empty_like(best).scatter_(0, order, best).view_as(valid_TK)


def _match(priority_TF: Tensor, open_TF: Tensor, rank_TF: Tensor, owed_T: Tensor, room_P: Tensor) -> Tensor:
    """bool [T, F]: candidates that get a slot; at most `owed_T` per token and `room_P` per rank."""
    order = _by_rank_and_priority(priority_TF, open_TF, rank_TF, room_P.shape[0])
    rank = rank_TF.flatten()[order]
    accepted_TF = torch.zeros_like(open_TF)
    for _ in range(_ROUNDS):
        missing_T = owed_T - accepted_TF.sum(1)
        proposed_TF = open_TF & (open_TF.cumsum(1) <= missing_T[:, None])
        won = _within(room_P, proposed_TF.flatten()[order], rank)
        won_TF = torch.empty_like(won).scatter_(0, order, won).view_as(open_TF)
        accepted_TF = accepted_TF | won_TF
        room_P = room_P - torch.zeros_like(room_P).scatter_add_(0, rank, won.long())
        open_TF = open_TF & ~won_TF & (room_P > 0)[rank_TF]
    return accepted_TF
