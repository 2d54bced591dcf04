"""Plan of temporary expert copies: hot experts are also computed on idle ranks, and no routing decision changes.

Every rank makes the same plan from the gathered counts: integers only, every choice by (value, index). After UltraEP
and MoonEP, which balance by copies; the greedy plan and the flows are ours.

1. `place_copies`: the fullest rank gives slots of its expert that has most of them left to the smallest room that holds
   what it gives, else to the largest one, until no rank is over the cap.
2. `flows`: slots of a source stay on its rank where that holds a copy or the expert itself; the others are dealt out
   in the order of sources and targets.

Copies may also keep their places (`plan_on`): then ranks over the cap give what theirs have room for.

Shapes: `S` sources (expert ranks x expert-tensor ranks, those of one expert rank in a row), `P` expert ranks, `E`
experts, `C` copies, `G` targets: the owners of experts with copies, and the copies.
"""

import heapq
from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from megatron_anyexperts.moe.quotas import slot_cap

# Steps of the bisection for the lowest load where the cap is out of reach: 2**-12 of the excess at the start.
_BISECTIONS = 12


@dataclass(frozen=True)
class CopyPlan:
    """Where the slots of experts with copies go; those of all other experts go to their owners.

    Attributes:
        cap: the most slots a rank is given; above the cap asked for only where that was not reached.
        expert_G: int64, the expert of a target; ascending, each owner before its copies.
        rank_G: int64, the rank of a target.
        flow_GS: int64, slots that each source sends to a target.
        copies: number of copies, ``G`` less the owners.
    """

    cap: int
    expert_G: np.ndarray
    rank_G: np.ndarray
    flow_GS: np.ndarray
    copies: int

    def load(self, load_E: np.ndarray, ranks: int) -> np.ndarray:
        """int64 [P], slots of each rank under the plan, of the slots [E] of each expert."""
        kept_E = load_E.copy()
        kept_E[self.expert_G] = 0
        load_P = kept_E.reshape(ranks, -1).sum(1)
        np.add.at(load_P, self.rank_G, self.flow_GS.sum(1))
        return load_P


def plan_copies(counts_SE: np.ndarray, ranks: int, copies_per_rank: int, eps: float, least: int = 1) -> CopyPlan:
    """Plan copies that bring every rank to at most ``ceil((1 + eps) * total / ranks)`` slots, or as near as they can.

    Args:
        counts_SE: int64, slots of every source for every expert.
        ranks: expert ranks `P`; rank `p` owns experts ``[p * E / P, (p + 1) * E / P)``.
        copies_per_rank: most copies that a rank holds.
        eps: allowed excess over the mean.
        least: fewest slots that a copy is made for, 1 or more. A rank whose excess is smaller keeps it.

    Raises:
        ValueError: the ranks do not divide the experts and the sources, or `copies_per_rank` is negative.
    """
    sources, experts = counts_SE.shape
    if experts % ranks or sources % ranks or copies_per_rank < 0:
        raise ValueError(
            f"{copies_per_rank} copies on each of {ranks} ranks cannot be planned for {experts} experts and {sources} "
            "sources; use a number of ranks that divides both, and 0 copies or more"
        )
    load_E = counts_SE.sum(0)
    load_P = load_E.reshape(ranks, -1).sum(1)
    goal, top = int(slot_cap(int(load_P.sum()), ranks, eps)), int(load_P.max())
    if top <= goal or copies_per_rank == 0:
        return _with_flows(counts_SE, ranks, [], max(top, goal))
    load = load_E.tolist(), load_P.tolist()
    cap, copies = goal, _place(*load, copies_per_rank, goal, least)
    if copies is None:
        missed, cap, copies = goal, top, []
        for _ in range(_BISECTIONS):
            if cap - missed <= 1:
                break
            middle = (missed + cap) // 2
            found = _place(*load, copies_per_rank, middle, least)
            if found is None:
                missed = middle
            else:
                cap, copies = middle, found
    plan = _with_flows(counts_SE, ranks, copies, cap)
    return plan if least == 1 else replace(plan, cap=max(cap, int(plan.load(load_E, ranks).max())))


def _place(
    load_E: list[int], load_P: list[int], copies_per_rank: int, cap: int, least: int
) -> list[tuple[int, int, int]] | None:
    copies = place_copies(load_E, load_P, copies_per_rank, cap, least=least)
    return place_copies(load_E, load_P, copies_per_rank, cap, True, least) if copies is None else copies


def place_copies(
    load_E: list[int], load_P: list[int], copies_per_rank: int, cap: int, fill: bool = False, least: int = 1
) -> list[tuple[int, int, int]] | None:
    """Copies as (expert, rank, slots) that leave no rank more than `cap` slots; None where the rooms do not suffice.

    Args:
        load_E: slots of each expert.
        load_P: slots of each rank, the sums of `load_E` over its experts.
        copies_per_rank: most copies that a rank holds.
        cap: most slots of a rank.
        fill: a copy takes all that its rank has room for, so that the owner may take copies of others in its turn;
            holds more, with more slots moved.
        least: fewest slots of a copy; what a rank has over the cap below that it keeps.
    """
    local = len(load_E) // len(load_P)
    excess = [(cap - load, rank) for rank, load in enumerate(load_P) if load > cap]  # a heap of negative numbers
    experts = {
        rank: [(-load_E[expert], expert) for expert in range(rank * local, (rank + 1) * local)] for _, rank in excess
    }
    for heap in experts.values():
        heapq.heapify(heap)
    heapq.heapify(excess)
    rooms = sorted((cap - load, rank) for rank, load in enumerate(load_P) if load < cap)
    used = [0] * len(load_P)
    copies = []
    while excess:
        if not rooms:
            return None
        (surplus, owner), heap = excess[0], experts[excess[0][1]]
        left, expert = heap[0]
        give = min(-surplus, -left)
        if give < least:
            heapq.heappop(excess)
            continue
        at = bisect_left(rooms, (give, -1))
        room, rank = rooms.pop(at if at < len(rooms) else -1)
        give = min(-left if fill else give, room)
        if give < least:
            return None
        copies.append((expert, rank, give))
        used[rank] += 1
        heapq.heapreplace(heap, (left + give, expert))
        if -surplus > give:
            heapq.heapreplace(excess, (surplus + give, owner))
        else:
            heapq.heappop(excess)
            if give > -surplus and used[owner] < copies_per_rank:
                insort(rooms, (give + surplus, owner))
        if room > give and used[rank] < copies_per_rank:
            insort(rooms, (room - give, rank))
    return copies


def places_of(plan: CopyPlan, local: int) -> list[tuple[int, int]]:
    """The expert and the rank of each copy, in the plan's order.

    Args:
        local: experts that a rank owns.
    """
    away_G = plan.rank_G != plan.expert_G // local
    return list(zip(plan.expert_G[away_G].tolist(), plan.rank_G[away_G].tolist(), strict=True))


def plan_on(places: list[tuple[int, int]], counts_SE: np.ndarray, ranks: int, eps: float) -> CopyPlan:
    """Plan flows to copies that are where they are, also to those that get none.

    Args:
        places: from `places_of`, of a plan for the same numbers of experts and ranks.
        counts_SE, ranks, eps: see `plan_copies`.
    """
    load_E = counts_SE.sum(0)
    load_P = load_E.reshape(ranks, -1).sum(1)
    goal, top = int(slot_cap(int(load_P.sum()), ranks, eps)), int(load_P.max())
    load = load_E.tolist(), load_P.tolist()
    missed, middle, cap, slots = goal - 1, goal, top, [0] * len(places)
    for _ in range(_BISECTIONS):
        if cap - missed <= 1:
            break
        fullest, found = _give(*load, places, middle)
        if fullest <= middle:
            cap, slots = middle, found
        else:
            missed = middle
        middle = (missed + cap) // 2
    copies = [(*place, given) for place, given in zip(places, slots, strict=True)]
    return _with_flows(counts_SE, ranks, copies, max(cap, goal))


def _give(load_E: list[int], load_P: list[int], places: list[tuple[int, int]], cap: int) -> tuple[int, list[int]]:
    """Slots of the fullest rank, and those of each copy, when ranks over `cap` give what the copies have room for."""
    local = len(load_E) // len(load_P)
    left_E, load_P, slots = list(load_E), list(load_P), [0] * len(places)
    of_owner = defaultdict(list)
    for number, (expert, rank) in enumerate(places):
        of_owner[expert // local].append((expert, rank, number))
    moved = True
    while moved:  # a rank that was over the cap has room for others' when it has given
        moved = False
        for owner in sorted(of_owner, key=lambda owner: (-load_P[owner], owner)):
            for expert, rank, number in sorted(of_owner[owner], key=lambda copy: (load_P[copy[1]], copy)):
                given = min(load_P[owner] - cap, left_E[expert], cap - load_P[rank])
                if given > 0:
                    slots[number] += given
                    left_E[expert] -= given
                    load_P[owner] -= given
                    load_P[rank] += given
                    moved = True
    return max(load_P), slots


def _with_flows(counts_SE: np.ndarray, ranks: int, copies: list[tuple[int, int, int]], cap: int) -> CopyPlan:
    """Deal out the slots of experts with copies: at home first, the rest by the order of sources and targets."""
    sources = counts_SE.shape[0]
    expert_C, rank_C, slots_C = np.array(sorted(copies), np.int64).reshape(-1, 3).T
    moved_M, first_M = np.unique(expert_C, return_index=True)
    # The owner stands before its copies.
    expert_G = np.insert(expert_C, first_M, moved_M)
    rank_G = np.insert(rank_C, first_M, moved_M // (counts_SE.shape[1] // ranks))
    row_G = np.searchsorted(moved_M, expert_G)
    owner_M = first_M + np.arange(len(moved_M))
    quota_G = np.insert(slots_C, first_M, 0)
    left_MS = counts_SE.T[moved_M]  # a copy: fancy indexing
    quota_G[owner_M] = left_MS.sum(1) - np.bincount(row_G, quota_G, len(moved_M)).astype(np.int64)

    flow_GS = np.zeros((len(expert_G), sources), np.int64)
    target_G = np.arange(len(expert_G))
    for local in range(sources // ranks):
        home_G = rank_G * (sources // ranks) + local
        stays_G = np.minimum(left_MS[row_G, home_G], quota_G)
        flow_GS[target_G, home_G] = stays_G
        left_MS[row_G, home_G] -= stays_G
        quota_G = quota_G - stays_G
    # What is left of an expert lies on a line twice, source by source and target by target: a flow is what overlaps.
    ends_G = quota_G.cumsum()
    start_M = (ends_G - quota_G)[owner_M]
    ends_G -= start_M[row_G]
    ends_MS = left_MS.cumsum(1)
    upper_GS = np.minimum(ends_MS[row_G], ends_G[:, None])
    lower_GS = np.maximum((ends_MS - left_MS)[row_G], (ends_G - quota_G)[:, None])
    flow_GS += np.maximum(upper_GS - lower_GS, 0)
    return CopyPlan(cap, expert_G, rank_G, flow_GS, len(copies))
