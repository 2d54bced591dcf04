"""What a place on each expert rank is worth, so that tokens that choose at these prices keep every rank within the cap.

The reroute is an assignment: every token has so many slots, every rank takes so many, and as little importance x gate
as possible is to be lost. Its linear program has one dual variable for each rank, the *price*: a token takes the
experts of largest value less price. Prices are found in a few rounds over all sources. In each round a source counts,
for each rank, by how much its entries are among the best of their tokens or fail to be (their *margins*), and the
counts are added up. `next_prices` reads from them the price at which each rank keeps as many as it may, together with
the common fall of what a slot is worth elsewhere when prices rise (the *shift*): without it, prices of ranks that all
tokens want would rise one after the other.

Whole numbers are exchanged, so all ranks find the same prices. Each of the functions has a kernel in `price_kernels.py`
that takes its place on a GPU, of which these are the definition.

Shapes: `T` local tokens, `E` experts, `P` expert ranks, `B = 2 * LEVELS` bins of margins.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_anyexperts.moe import fused_prices
from megatron_anyexperts.moe.decision import RoutingDecision
from megatron_anyexperts.moe.price_rounds import (
    ABSOLUTE,
    FIRST_LEVEL,
    FREE_ROUNDS,
    LEVELS,
    RELATIVE,
    ROUNDS,
    aim_at,
    edges,
    shift_from,
)
from megatron_anyexperts.moe.quotas import on_host, sort_rows


def offers(decision: RoutingDecision) -> Tensor:
    """fp32 [T, E], what each expert is worth to a token that may have it, -inf elsewhere.

    That is importance x gate. A routed slot is worth at least what the token's best other expert is, whatever its
    gate: where no place has a price, the router's choice stands (its expert bias has no gate). No two are equal.
    """
    map_TE = decision.routing_map_TE
    gates_TE = torch.where(map_TE, decision.gates_TE, decision.fallback_gates_TE).float()
    value_TE = gates_TE * decision.importance_T.unsqueeze(1)
    other_TE = value_TE.masked_fill(map_TE | ~decision.eligible_TE, 0.0)
    value_TE = torch.where(map_TE, torch.maximum(value_TE, other_TE.amax(1, keepdim=True)), value_TE)
    rows, columns = (torch.arange(size, dtype=torch.int64, device=map_TE.device) for size in map_TE.shape)
    rows, columns = rows * 2654435761 >> 8 & 0xFFFFFF, columns * 2246822519 >> 8 & 0xFFFFFF
    apart_TE = (rows.int().unsqueeze(1) ^ columns.int()).float() * 2.0**-24 + 2.0 * map_TE
    value_TE = value_TE + (value_TE * RELATIVE + ABSOLUTE) * apart_TE
    return value_TE.masked_fill(~(map_TE | decision.eligible_TE) | ~map_TE.any(1, keepdim=True), -torch.inf)


def count_margins(value_TE: Tensor, slots_T: Tensor, price_P: Tensor, counts_PB: Tensor) -> None:
    """Add up the margins of one source's entries at these prices, by rank and bin.

    An entry among the best `slots_T` of its token has what it is ahead of the best one that is not, in the upper half
    of the bins; any other, what it is behind the last one that is, in the lower half.

    Args:
        value_TE: from `offers`.
        slots_T: int64, slots of a token.
        price_P: fp32.
        counts_PB: int64, added to.
    """
    ranks, experts = len(price_P), value_TE.shape[1]
    net_TE, last_T1, next_T1 = _at_prices(value_TE, slots_T, price_P)
    among_TE = net_TE >= last_T1
    margin_TE = net_TE - torch.where(among_TE, next_T1, last_T1)
    level_TE = (margin_TE.abs().view(torch.int32) >> 22).sub_(FIRST_LEVEL).clamp_(0, LEVELS - 1)
    bin_TE = torch.where(among_TE, LEVELS + level_TE, LEVELS - 1 - level_TE)
    first_P = torch.arange(0, counts_PB.numel(), 2 * LEVELS, dtype=torch.int32, device=bin_TE.device)
    bin_TE += first_P.repeat_interleave(experts // ranks)
    taken_TE = value_TE > -torch.inf
    if on_host(value_TE):
        counts = np.bincount(bin_TE[taken_TE].numpy(), minlength=counts_PB.numel())
        counts_PB += torch.from_numpy(counts).view_as(counts_PB)
    else:
        counts_PB.view(-1).scatter_add_(0, bin_TE.flatten().long(), taken_TE.flatten().to(counts_PB.dtype))


def next_prices(price_P: Tensor, counts_PB: Tensor, cap: int, slots: int, number: int) -> Tensor:
    """Prices at which each rank keeps as many as it may, judged by the margins at the prices before.

    Args:
        price_P: fp32, prices before.
        counts_PB: int64, margins of all sources, from `count_margins`.
        cap: slots a rank may receive.
        slots: slots of all sources.
        number: of the round, from 0. From `FREE_ROUNDS` on prices stay when all ranks are within the cap.

    Returns:
        fp32 [P], at least 0.
    """
    above_PB = torch.nn.functional.pad(counts_PB.flip(1).cumsum(1).flip(1), (0, 1)).double()
    aim = aim_at(cap, slots, len(price_P), number)
    edge_B = edges(price_P.device)
    # Where the number of margins above passes what a rank may keep, taken to be even within a bin.
    bin_P1 = (above_PB[:, 1:] > aim).sum(1, keepdim=True).clamp_max(2 * LEVELS - 1)
    more_P1, less_P1 = above_PB.gather(1, bin_P1), above_PB.gather(1, bin_P1 + 1)
    share_P1 = ((more_P1 - aim) / (more_P1 - less_P1).clamp_min(1)).clamp(0, 1)
    rise_P1 = edge_B[bin_P1] + share_P1 * (edge_B[bin_P1 + 1] - edge_B[bin_P1])
    rise_P1 = rise_P1.masked_fill(above_PB[:, :1] <= aim, -32.0)
    # The shift: where all ranks together keep all slots, each at that price or, if that is below 0, at none.
    margin_PB = -price_P.double().unsqueeze(1) - edge_B[:-1]
    kept_B = _above(margin_PB, above_PB, edge_B).clamp_max(aim).sum(0)
    after = (kept_B < slots).sum().clamp(1, 2 * LEVELS - 1)
    share = ((slots - kept_B[after - 1]) / (kept_B[after] - kept_B[after - 1]).clamp_min(1)).clamp(0, 1)
    shift = edge_B[after - 1] + share * (edge_B[after] - edge_B[after - 1])
    over = (above_PB[:, LEVELS] - cap).clamp_min(0).sum()
    shift = torch.where(over * shift_from(slots, number) > slots, shift, 0.0)
    found_P = (price_P.double() + rise_P1.squeeze(1) + shift).clamp_min(0).float()
    return torch.where((over == 0) & (number >= FREE_ROUNDS), price_P, found_P)


def choose(value_TE: Tensor, slots_T: Tensor, price_P: Tensor) -> Tensor:
    """bool [T, E], the best `slots_T` experts of each token at these prices; of equal ones the first."""
    net_TE, last_T1, _ = _at_prices(value_TE, slots_T, price_P)
    more_TE, equal_TE = net_TE > last_T1, net_TE == last_T1
    left_T1 = slots_T.unsqueeze(1) - more_TE.sum(1, keepdim=True)
    return (more_TE | equal_TE & (equal_TE.cumsum(1) <= left_T1)) & (slots_T > 0).unsqueeze(1)


@dataclass(frozen=True)
class Offers:
    """One source's side of the search for prices.

    Attributes:
        value_TE: see `offers`.
        routed_TE: bool, the router's choice.
        slots_T: int64.
        k_max: most slots of a token.
        fused: use kernels.
    """

    value_TE: Tensor
    routed_TE: Tensor
    slots_T: Tensor
    k_max: int
    fused: bool

    @classmethod
    def of(cls, decision: RoutingDecision, k_max: int, fused: bool) -> "Offers":
        """What the local tokens may have; `fallback_gates_TE` and `eligible_TE` must be there."""
        routed_TE = decision.routing_map_TE
        if not fused:
            return cls(offers(decision), routed_TE, routed_TE.sum(1), k_max, fused)
        gates = decision.gates_TE.detach(), decision.fallback_gates_TE.detach()
        value_TE, slots_T = fused_prices.offer(*gates, routed_TE, decision.eligible_TE, decision.importance_T)
        return cls(value_TE, routed_TE, slots_T, k_max, fused)

    def count(self, price_P: Tensor, counts_PB: Tensor) -> None:
        """Add up this source's margins at these prices."""
        if self.fused:
            fused_prices.count_margins(self.value_TE, self.slots_T, price_P, self.k_max, counts_PB)
        else:
            count_margins(self.value_TE, self.slots_T, price_P, counts_PB)

    def choose(self, price_P: Tensor) -> tuple[Tensor, Tensor]:
        """bool [T, E], what the local tokens take at these prices, and int64, how many of these slots moved."""
        if self.fused:
            chosen_TE, moved_T = fused_prices.choose(self.value_TE, self.slots_T, price_P, self.routed_TE, self.k_max)
            return chosen_TE, moved_T.sum()
        chosen_TE = choose(self.value_TE, self.slots_T, price_P)
        return chosen_TE, (chosen_TE > self.routed_TE).sum()


def find_prices(
    count: Callable[[Tensor, Tensor], None], ranks: int, cap: int, slots: int, device: torch.device, fused: bool = False
) -> Tensor:
    """fp32 [P], prices at which every rank is within its cap, or nearly.

    Args:
        count: of prices and zeroed counts int64 [P, B]: adds up the margins of all sources there.
        ranks: P.
        cap, slots: see `next_prices`.
        device: where to work.
        fused: use kernels.
    """
    step = fused_prices.next_prices if fused else next_prices
    # One launch for all that begins at 0: the last matrix stands for no prices.
    zeros_RPB = torch.zeros(ROUNDS + 1, ranks, 2 * LEVELS, dtype=torch.int64, device=device)
    price_P = zeros_RPB[-1].view(torch.float32).view(-1)[:ranks]
    for number, counts_PB in enumerate(zeros_RPB[:-1]):
        count(price_P, counts_PB)
        if number >= FREE_ROUNDS and on_host(counts_PB) and (counts_PB[:, LEVELS:].sum(1) <= cap).all():
            break
        price_P = step(price_P, counts_PB, cap, slots, number)
    return price_P


def _at_prices(value_TE: Tensor, slots_T: Tensor, price_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value less price, that of a token's last slot, and of the best one after it (-inf: there is none)."""
    experts = value_TE.shape[1]
    net_TE = value_TE - price_P.repeat_interleave(experts // len(price_P))
    falling_TE = torch.nn.functional.pad(sort_rows(-net_TE), (0, 1), value=torch.inf)
    last_T1 = falling_TE.gather(1, (slots_T - 1).clamp_min(0).unsqueeze(1)).neg()
    return net_TE, last_T1, falling_TE.gather(1, slots_T.unsqueeze(1)).neg()


def _above(margin_PB: Tensor, above_PB: Tensor, edge_B: Tensor) -> Tensor:
    """Number of margins of a rank above each of these, taken to be even within a bin."""
    level_PB = (margin_PB.float().abs().view(torch.int32) >> 22).sub_(FIRST_LEVEL).clamp_(0, LEVELS - 1).long()
    bin_PB = torch.where(margin_PB >= 0, LEVELS + level_PB, LEVELS - 1 - level_PB)
    lower_PB = edge_B[bin_PB]
    share_PB = ((margin_PB - lower_PB) / (edge_B[bin_PB + 1] - lower_PB)).clamp(0, 1)
    more_PB, less_PB = above_PB.gather(1, bin_PB), above_PB.gather(1, bin_PB + 1)
    return more_PB + share_PB * (less_PB - more_PB)
