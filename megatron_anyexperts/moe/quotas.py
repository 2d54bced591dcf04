"""Integer planning of dispatch under a slot budget.

Every rank sees the same demand matrix and computes the same plan from it, without further communication:

1. `slot_cap`: the most slots an expert rank may receive, ``C = ceil((1 + eps) * R / P)``.
2. `plan_dispatch`: how many slots each source may send to each expert rank (its *quota*), and how many of the slots
   it has to give up it may send to the ranks that have *room* instead.

Shapes: `S` source ranks (expert-parallel x expert-tensor-parallel), `P` expert ranks (destinations), `E` experts.
The arithmetic is that of whole numbers in float64, three times as fast as int64 division. It is exact as long as
``R * max(C, 2 * S) < 2**52`` (a step of 2**26 slots over 256 ranks needs 2**44): a quotient a/b below an integer misses
it by at least 1/b, which float64 resolves while a < 2**52. It runs on the demand's device and does not synchronise a
GPU with its host.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

# Low-discrepancy phases (golden ratio in 16 bits): see `_share_room`.
_GOLDEN_16 = 40503


@dataclass(frozen=True)
class DispatchPlan:
    """What each source may send.

    Attributes:
        cap: int64 scalar, slots an expert rank may receive.
        quota_SP: int64, slots a source may send out of its own demand; at most the demand, column sums at most `cap`.
        room_SP: int64, slots a source may reroute to a rank; `(quota_SP + room_SP)` has column sums at most `cap`.
    """

    cap: Tensor
    quota_SP: Tensor
    room_SP: Tensor


def slot_cap(total_slots: Tensor, ranks: int, eps: float) -> Tensor:
    """Slots an expert rank may receive: ``ceil((1 + eps) * total_slots / ranks)``, in exact arithmetic.

    Args:
        total_slots: int64 scalar, real slots of the step over all sources.
        ranks: expert ranks that share them.
        eps: allowed excess over the mean, a finite number >= 0, taken to six decimals.

    Raises:
        ValueError: `eps` is negative or not finite, so no dispatch could satisfy the cap.
    """
    if not 0 <= eps < float("inf"):
        raise ValueError(
            f"eps={eps} is no feasible dispatch cap: below 0 the expert ranks together hold fewer slots than are sent; "
            "use eps >= 0 (0.05 allows 5 % over the mean), or switch the cap off"
        )
    factor = 1 + Fraction(eps).limit_denominator(10**6)
    return -(-total_slots * factor.numerator // (ranks * factor.denominator))


def plan_dispatch(demand_SP: Tensor, cap: Tensor | int) -> DispatchPlan:
    """Quotas and room for one step.

    Demand for a rank at or under the cap passes untouched. Demand for a rank over the cap is scaled down to exactly
    the cap, each source in proportion to its demand (largest remainder). The room left on the other ranks is shared
    among the sources in proportion to what they have to give up.

    Args:
        demand_SP: int64 [S, P], slots each source would like to send to each expert rank.
        cap: slots a rank may receive, from `slot_cap`.

    Raises:
        ValueError: the cap is infeasible, that is ``cap * P`` is less than the total demand. Checked only where the
            demand lies on the CPU: on a GPU the check would synchronise, and `slot_cap` cannot return such a cap.
    """
    ranks = demand_SP.shape[1]
    load_P = demand_SP.sum(0)
    cap = torch.as_tensor(cap, dtype=torch.int64, device=demand_SP.device)
    if on_host(demand_SP) and cap * ranks < load_P.sum():
        raise ValueError(
            f"cap={cap.item()} on {ranks} expert ranks holds {cap.item() * ranks} slots, but {load_P.sum().item()} are "
            f"to be sent; use a cap of at least {-(-load_P.sum().item() // ranks)}"
        )
    rank_P = torch.arange(ranks, device=demand_SP.device)
    if on_host(demand_SP):  # on a GPU, picking the ranks over the cap would synchronise
        rank_P = rank_P[load_P > cap]
    quota_SP = demand_SP.clone()
    quota_SP[:, rank_P] = _largest_remainder(demand_SP, torch.minimum(load_P, cap), rank_P)
    given_up_S = demand_SP.sum(1) - quota_SP.sum(1)
    return DispatchPlan(cap, quota_SP, _share_room(given_up_S, (cap - load_P).clamp_min(0)))


def share_wanted(wanted_SP: Tensor, left_P: Tensor) -> Tensor:
    """Room left after the plan, for those who can use it: in proportion to their wishes and never more than these.

    Args:
        wanted_SP: int64 [S, P], places each source could still fill on each rank.
        left_P: int64, places left on each rank.

    Returns:
        int64 [S, P]; column sums are exactly ``min(left_P, wanted_SP.sum(0))``.
    """
    seats_P = torch.minimum(wanted_SP.sum(0), left_P)
    return _largest_remainder(wanted_SP, seats_P, torch.arange(len(left_P), device=left_P.device))


def _largest_remainder(demand_SP: Tensor, seats_P: Tensor, rank_P: Tensor) -> Tensor:
    """Columns `rank_P` of the demand, scaled down proportionally to the sums `seats_P[rank_P]`."""
    # One contiguous row per rank, and few temporaries: sorting columns, or a fresh page for every step, would
    # take as long as the rest.
    demand_PS, seats_P1 = demand_SP.T[rank_P].double(), seats_P[rank_P, None]
    sources = demand_PS.shape[1]
    load_P1 = demand_PS.sum(1, keepdim=True)
    scaled_PS = demand_PS * seats_P1
    floor_PS = (scaled_PS / load_P1.clamp_min(1)).floor_()
    remainder_PS = scaled_PS.sub_(floor_PS * load_P1)
    left_P1 = seats_P1 - floor_PS.sum(1, keepdim=True).long()
    # Equal remainders are common (equal demands). `source ^ rank` puts the sources in another order in each
    # row, so that no source loses every tie.
    source_S = torch.arange(sources, device=demand_SP.device)
    width = max(sources, seats_P.shape[0]).bit_length()
    key_PS = remainder_PS.mul_(1 << width).add_(source_S ^ rank_P[:, None])
    threshold_P1 = sort_rows(key_PS).gather(1, (sources - left_P1).clamp_max(sources - 1))
    return floor_PS.add_((key_PS >= threshold_P1) & (left_P1 > 0)).T.long()


def _share_room(given_up_S: Tensor, room_P: Tensor) -> Tensor:
    """Share `room_P` among sources in proportion to `given_up_S`; column sums are exactly `room_P`.

    Systematic apportionment: the sources lie on a line, each as long as its share, and a source gets the integer
    marks on its piece. Each share is the exact one rounded up or down. The marks start at a different phase in
    each column, so that the roundings of one source cancel over the columns instead of adding up.
    """
    edge_S = torch.nn.functional.pad(given_up_S.cumsum(0), (1, 0))  # S + 1 ends of pieces
    total = edge_S[-1].clamp_min(1)
    phase_P = torch.arange(room_P.shape[0], device=room_P.device) * _GOLDEN_16 % 65536 * total // 65536
    marks_SP = (edge_S.double()[:, None] * room_P).add_(phase_P).div_(total).floor_()
    return (marks_SP[1:] - marks_SP[:-1]).long()


_as_on_gpu = False


def on_host(tensor: Tensor) -> bool:
    """Whether asking for values of a tensor is cheap: it lies on the CPU."""
    return tensor.device.type == "cpu" and not _as_on_gpu


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Take the way that waits for no device on a CPU too: to count and to test it."""
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, True
    try:
        yield
    finally:
        _as_on_gpu = before


def sort_rows(key: Tensor) -> Tensor:
    """Rows of `key` [N, M] in ascending order."""
    # numpy's vectorised sort takes a tenth of torch's time on a CPU.
    if on_host(key):
        return torch.from_numpy(np.sort(key.numpy(), axis=1))
    return key.sort(dim=1).values
