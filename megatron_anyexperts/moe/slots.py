"""How many slots a token gets and which columns fill them: pure functions over tensors, no process group, no sync.

Shapes: T tokens, K = k_max real candidates, V virtual candidates, C = K + V candidates.

The fill is *nested*: the columns of k slots are those of k - 1 slots and one more. So each candidate column has one
number, the slot it enters in, and whatever changes k (range, controller, trim) only moves a threshold.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor


def virtual_cap(slots: int, rho_max: float) -> int:
    """Return how many of `slots` slots may be virtual: floor(rho_max * slots), safe against rounding (0.29 * 100)."""
    return math.floor(rho_max * slots + 1e-9)


@lru_cache(maxsize=64)
def cap_steps(k_max: int, rho_max: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, for real rank i, the first k that leaves i + 1 slots to real experts, and, for virtual rank r, the first
    k that allows r + 1 virtual slots; fp32 [K, 1] and [V, 1]. Kept per device: making them anew would stall a GPU for
    the copy."""
    caps = [virtual_cap(k, rho_max) for k in range(2 * k_max + 2 + int(k_max / max(1 - rho_max, 1e-3)))]
    real = [next(k for k, cap in enumerate(caps) if k - cap >= i + 1) for i in range(k_max)]
    virtual = [next(k for k, cap in enumerate(caps) if cap >= r + 1) for r in range(caps[k_max])]
    return tuple(torch.tensor(k, dtype=torch.float32, device=device).unsqueeze(1) for k in (real, virtual))


def soft_slots(importance_T: Tensor, offset: Tensor | float, k_min: int, k_max: int) -> Tensor:
    """Return the continuous slot count, k_min + (k_max - k_min) * clamp(importance + offset, 0, 1); fp32 [T]."""
    return k_min + (k_max - k_min) * (importance_T + offset).clamp(0, 1)


def integer_slots(soft_T: Tensor, gradient: str) -> Tensor:
    """Return the integer slot count k [T], int64.

    Args:
        soft_T: continuous slot count, at least 1.
        gradient: "fractional" rounds up, since the last slot is scaled by the fractional part; "straight_through" and
            "none" round half up.
    """
    soft_T = soft_T.detach()
    return (soft_T.ceil() if gradient == "fractional" else (soft_T + 0.5).floor()).long()


def trim_to_budget(slots_T: Tensor, importance_T: Tensor, k_min: int, budget: Tensor | int) -> Tensor:
    """Take extra slots from the least important tokens until at most `budget` are left; no token falls below k_min.

    Unchanged when the sum is within the budget. Not causal: it looks at all T tokens.

    Args:
        slots_T: int64, each at least k_min, or 0 for a token that takes no part.
        importance_T: fp32.
        budget: slots, int64; where k_min each is more than that, the result is k_min each.
    """
    order_T = importance_T.argsort(stable=True)
    extra_T = (slots_T - k_min).clamp(min=0)[order_T]
    excess = (slots_T.sum() - budget).clamp(min=0)
    taken_before_T = extra_T.cumsum(0) - extra_T
    taken_T = torch.minimum(extra_T, (excess - taken_before_T).clamp(min=0))
    return slots_T - torch.zeros_like(slots_T).scatter(0, order_T, taken_T)


def entry_slots(real_TK: Tensor, virtual_TV: Tensor | None, rho_max: float) -> Tensor:
    """Return the slot number, 1-based, in which each candidate column enters; a token with k slots uses entries <= k.

    Equals "the best k eligible columns win, of them at most floor(rho_max * k) virtual" for every k at once. On ties
    the real column wins.

    Args:
        real_TK: selection scores of the best k_max real columns, descending.
        virtual_TV: selection scores of virtual columns, descending; None: no virtual columns. Columns beyond rank
            floor(rho_max * k_max) must have been cut off.
        rho_max: in [0, 1).

    Returns:
        whole numbers, fp32 [T, K + V], or [1, K] (the same for every token) without virtual columns.
    """
    k_max = real_TK.shape[1]
    rank_K = torch.arange(1, k_max + 1, dtype=torch.float32, device=real_TK.device)
    if virtual_TV is None:
        return rank_K.unsqueeze(0)
    # Columns first and counted in fp32: with tokens innermost, and without integer sums, a CPU is four times faster.
    real_KT, virtual_VT = real_TK.t().contiguous(), virtual_TV.t().contiguous()
    real_first_K1, virtual_first_V1 = cap_steps(k_max, rho_max, real_TK.device)
    rank_K1 = rank_K.unsqueeze(1)
    ahead_VKT = torch.gt(virtual_VT.unsqueeze(1), real_KT, out=real_KT.new_empty(len(virtual_VT), *real_KT.shape))
    real_in_KT = torch.minimum(ahead_VKT.sum(0) + rank_K1, real_first_K1)
    # Rank and the real columns not behind it: rank + (k_max - those behind).
    virtual_in_VT = torch.maximum(rank_K1[: len(virtual_VT)] + k_max - ahead_VKT.sum(1), virtual_first_V1)
    return torch.cat((real_in_KT, virtual_in_VT)).t()


def last_slot_weight(soft_T: Tensor, slots_T: Tensor, gradient: str) -> Tensor | None:
    """Return the factor of each token's last slot, through which the slot count gets its gradient; fp32 [T].

    "fractional": the fractional part of `soft_T` in (0, 1], 1 where the trim took slots; "straight_through": 1 with the
    gradient of `soft_T`; "none": None, for 1.
    """
    if gradient == "none":
        return None
    if gradient == "straight_through":
        return 1 + (soft_T - soft_T.detach())
    return (soft_T - (slots_T - 1)).clamp(max=1)


def slot_weights(entry_TC: Tensor, slots_T: Tensor, last_T: Tensor | None, log: bool = False) -> tuple[Tensor, Tensor]:
    """Return which candidate columns are in use, bool [T, C], and their weights, fp32 [T, C].

    The weight is 1 in use, `last_T` for the token's last slot and 0 unused. With `log` it is the logarithm of that,
    taken here of one value per token, which keeps log(0) out of the backward pass.
    """
    slots_T1 = slots_T.to(entry_TC.dtype).unsqueeze(1)
    used_TC = entry_TC <= slots_T1
    one, none = (0.0, float("-inf")) if log else (1.0, 0.0)
    weight_TC = torch.where(used_TC, one, none)
    if last_T is not None:
        last_T1 = (last_T.log() if log else last_T).unsqueeze(1)
        weight_TC = torch.where(entry_TC == slots_T1, last_T1, weight_TC)
    return used_TC, weight_TC
