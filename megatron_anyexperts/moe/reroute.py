"""Fit one source's slots to its share of the dispatch plan: keep, reroute, or make virtual.

`prices.py` settles nearly everything; this is for what prices leave over. A slot's *margin* is what its token would
lose with the next best choice: slots of the smallest margin move.

Shapes: `T` local tokens, `E` experts, `P` expert ranks, `L = E / P` experts of a rank, `C` candidates of a token, `N`
tokens that still have slots to place.
"""

from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from megatron_anyexperts.moe.admission import admit, best
from megatron_anyexperts.moe.decision import RoutingDecision
from megatron_anyexperts.moe.quotas import on_host, sort_rows

# Below any value times any price, and far enough from the end of float32 for differences.
_NONE = -1e9


@dataclass(frozen=True)
class FittedSlots:
    """A routing decision that respects the plan.

    Attributes:
        gates_TE: gates of the slots to send, 0 elsewhere; differentiable.
        routing_map_TE: bool, the slots to send.
        displaced_gate_T: summed gates of the token's slots that became virtual; differentiable. None: none did.
        rerouted: int64 scalar, slots that changed their expert.
        displaced: slots that became virtual: int64 scalar, or 0.
    """

    gates_TE: Tensor
    routing_map_TE: Tensor
    displaced_gate_T: Tensor | None
    rerouted: Tensor
    displaced: Tensor | int


@torch.no_grad()
def fit_to_plan(decision: RoutingDecision, quota_P: Tensor, room_P: Tensor, k_max: int) -> Tensor:
    """The slots to send, bool [T, E]: what is over quota goes where there is room, as long as there is any.

    Slots on ranks within quota stay. On a rank over quota those of the largest margin stay, exactly `quota_P`. Each of
    the others goes to the token's best eligible expert on a rank with room; where slots compete, the largest margin
    wins, and who lost tries again among all experts. A slot finds no place only when no rank with an eligible expert
    has room.

    Args:
        decision: routing of the local tokens; `fallback_gates_TE` and `eligible_TE` must be there.
        quota_P: int64, slots this source may send to each rank out of its own choice.
        room_P: int64, slots it may reroute to each rank; 0 where it is over quota.
        k_max: most real slots of a token.
    """
    map_TE = decision.routing_map_TE
    experts, ranks = map_TE.shape[1], quota_P.shape[0]
    local = experts // ranks
    over_P = map_TE.sum(0).view(ranks, local).sum(1) > quota_P
    contested_TE = map_TE & over_P.repeat_interleave(local)
    rows = _rows(contested_TE.any(1))
    value_NE, contested_NE = _value(decision, rows), contested_TE[rows]
    open_NE = decision.eligible_TE[rows] & ~map_TE[rows] & (room_P > 0).repeat_interleave(local)
    own_NK, own_expert_NK = _best(value_NE.masked_fill(~contested_NE, _NONE), k_max)
    other_NF, other_expert_NF = _best(value_NE.masked_fill(~open_NE, _NONE), 2 * k_max)
    value_NC, rank_NC = torch.cat((own_NK, other_NF), 1), torch.cat((own_expert_NK, other_expert_NF), 1) // local
    owed_N = contested_NE.sum(1)
    margin_NC = _margins(value_NC, owed_N)
    width = own_NK.shape[1]
    keep_NK = admit(margin_NC[:, :width], own_NK > _NONE, rank_NC[:, :width], quota_P)
    kept_NE = torch.zeros_like(value_NE).scatter_add_(1, own_expert_NK, keep_NK.to(value_NE.dtype)) > 0
    fitted_TE = map_TE.clone()
    fitted_TE[rows] &= ~contested_NE | kept_NE
    return place(decision, fitted_TE, room_P, k_max)


@torch.no_grad()
def place(decision: RoutingDecision, fitted_TE: Tensor, room_P: Tensor, k_max: int) -> Tensor:
    """Give tokens with fewer slots than they were routed further ones, until no rank with room is open to any of them.

    Args:
        decision: routing of the local tokens.
        fitted_TE: bool, the slots they have.
        room_P: int64, slots that may be added on each rank.
        k_max: most real slots of a token.

    Returns:
        bool [T, E], `fitted_TE` and the slots added.
    """
    fitted_TE, ranks = fitted_TE.clone(), room_P.shape[0]
    local = fitted_TE.shape[1] // ranks
    rank_E = torch.arange(ranks, device=room_P.device).repeat_interleave(local)
    for turn in count():
        missing_T = decision.routing_map_TE.sum(1) - fitted_TE.sum(1)
        # The first turn places nearly all: only then a GPU is waited for.
        rows = _rows(missing_T > 0, asking=turn > 0)
        if not len(rows):
            return fitted_TE
        open_NE = _open(decision, fitted_TE, room_P, rows)
        if turn > 0 and not open_NE.any():
            return fitted_TE
        net_NE = _value(decision, rows)
        net_NC, expert_NC = _best(net_NE.masked_fill(~open_NE, _NONE), k_max + 1)
        column_C = torch.arange(net_NC.shape[1], device=net_NC.device)
        proposed_NC = (column_C < missing_T[rows].unsqueeze(1)) & open_NE.gather(1, expert_NC)
        won_NC = admit(_margins(net_NC, missing_T[rows]), proposed_NC, rank_E[expert_NC], room_P)
        won_NE = torch.zeros_like(open_NE).scatter_(1, expert_NC, won_NC)
        fitted_TE[rows] |= won_NE
        room_P = room_P - won_NE.sum(0).view(ranks, local).sum(1)


@torch.no_grad()
def wanted(decision: RoutingDecision, fitted_TE: Tensor, ranks: int) -> Tensor:
    """int64 [P], places that the local tokens could still fill on each rank, were there room."""
    rows = _rows(fitted_TE.sum(1) < decision.routing_map_TE.sum(1))
    everywhere_P = torch.ones(ranks, dtype=torch.int64, device=fitted_TE.device)
    missing_N1 = (decision.routing_map_TE[rows].sum(1) - fitted_TE[rows].sum(1)).unsqueeze(1)
    open_NPL = _open(decision, fitted_TE, everywhere_P, rows).view(len(rows), ranks, fitted_TE.shape[1] // ranks)
    return torch.minimum(open_NPL.sum(2), missing_N1).sum(0)


@torch.no_grad()
def at_prices(decision: RoutingDecision, chosen_TE: Tensor) -> RoutingDecision:
    """The decision as if the router had made this choice, of slots and of eligible experts."""
    gates_TE = torch.where(decision.routing_map_TE, decision.gates_TE, decision.fallback_gates_TE)
    eligible_TE = decision.eligible_TE | decision.routing_map_TE
    return replace(
        decision,
        gates_TE=gates_TE * chosen_TE,
        routing_map_TE=chosen_TE,
        fallback_gates_TE=gates_TE * ~chosen_TE,
        eligible_TE=eligible_TE,
    )


def settled(decision: RoutingDecision, fitted_TE: Tensor, rerouted: Tensor) -> FittedSlots:
    """Gates of the slots to send where every token has as many as it was routed."""
    gates_TE = torch.where(decision.routing_map_TE, decision.gates_TE, decision.fallback_gates_TE) * fitted_TE
    return FittedSlots(gates_TE, fitted_TE, None, rerouted, 0)


def with_gates(decision: RoutingDecision, fitted_TE: Tensor, k_max: int) -> FittedSlots:
    """Gates of the slots to send; where a token has fewer than it was routed, its smallest lost gates are virtual."""
    with torch.no_grad():
        kept_TE = fitted_TE & decision.routing_map_TE
        rerouted_TE = fitted_TE & ~decision.routing_map_TE
        missing_T = decision.routing_map_TE.sum(1) - fitted_TE.sum(1)
        rows = _rows(missing_T > 0)
        lost_NE = decision.gates_TE[rows].masked_fill(fitted_TE[rows] | ~decision.routing_map_TE[rows], torch.inf)
        index_NK = best(-lost_NE, min(k_max, lost_NE.shape[1]))
        column_K = torch.arange(index_NK.shape[1], device=rows.device)
        virtual_NK = column_K < missing_T[rows].unsqueeze(1)
    lost_N = (decision.gates_TE[rows].gather(1, index_NK) * virtual_NK).sum(1)
    return FittedSlots(
        gates_TE=torch.where(rerouted_TE, decision.fallback_gates_TE, decision.gates_TE * kept_TE),
        routing_map_TE=fitted_TE,
        displaced_gate_T=torch.zeros_like(decision.gates_TE[:, 0]).index_add(0, rows, lost_N),
        rerouted=rerouted_TE.sum(),
        displaced=missing_T.sum(),
    )


def _rows(flag_T: Tensor, asking: bool = False) -> Tensor:
    # On a GPU, picking rows would wait for the device: all of them are worked on instead.
    if asking or on_host(flag_T):
        return flag_T.nonzero().flatten()
    return torch.arange(len(flag_T), device=flag_T.device)


def _best(value_NE: Tensor, count: int) -> tuple[Tensor, Tensor]:
    column_NK = best(value_NE, min(count, value_NE.shape[1]))
    return value_NE.gather(1, column_NK), column_NK


def _value(decision: RoutingDecision, rows: Tensor) -> Tensor:
    """fp32 [N, E], importance x gate of the slots a token has or could have."""
    gates_NE = torch.where(decision.routing_map_TE[rows], decision.gates_TE[rows], decision.fallback_gates_TE[rows])
    return decision.importance_T[rows].unsqueeze(1) * gates_NE.float()


def _open(decision: RoutingDecision, fitted_TE: Tensor, room_P: Tensor, rows: Tensor) -> Tensor:
    """bool [N, E], eligible experts without a slot of the token, on ranks with room."""
    room_E = (room_P > 0).repeat_interleave(fitted_TE.shape[1] // len(room_P))
    return decision.eligible_TE[rows] & ~decision.routing_map_TE[rows] & ~fitted_TE[rows] & room_E


def _margins(net_NC: Tensor, owed_N: Tensor) -> Tensor:
    """What a token loses without a candidate among its best `owed_N`; below 0, what others lack to be among them."""
    sorted_NC = -sort_rows(-net_NC)
    last_N1 = sorted_NC.gather(1, (owed_N - 1).clamp_min(0).unsqueeze(1))
    next_N1 = sorted_NC.gather(1, owed_N.clamp_max(net_NC.shape[1] - 1).unsqueeze(1)).clamp_min(0)
    return net_NC - torch.where(net_NC >= last_N1, next_N1, last_N1)
