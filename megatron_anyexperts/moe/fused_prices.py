"""The kernels of `price_kernels` as operators of torch; `prices.py` defines them and their arguments."""

import torch
from torch import Tensor

from megatron_anyexperts.moe import price_rounds as rounds

TOKENS = 4
"""Of one program."""
RANKS = 16
"""Ranks that `next_prices` looks at together."""


def _power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _grid(tokens: int) -> tuple[int]:
    return (-(-tokens // TOKENS),)


def _offer(
    gates_TE: Tensor, fallback_TE: Tensor, map_TE: Tensor, eligible_TE: Tensor, importance_T: Tensor
) -> tuple[Tensor, Tensor]:
    from megatron_anyexperts.moe import price_kernels

    tokens, experts = map_TE.shape
    value_TE = torch.empty(tokens, experts, device=map_TE.device)
    slots_T = torch.empty(tokens, dtype=torch.int64, device=map_TE.device)
    if tokens:
        price_kernels.offer[_grid(tokens)](
            gates_TE.contiguous(), fallback_TE.contiguous(), map_TE.contiguous(), eligible_TE.contiguous(),
            importance_T.contiguous(), value_TE, slots_T, tokens,
            E=experts, E2=_power(experts), RELATIVE=rounds.RELATIVE, ABSOLUTE=rounds.ABSOLUTE, TOKENS=TOKENS,
        )  # fmt: skip
    return value_TE, slots_T


def _count_margins(value_TE: Tensor, slots_T: Tensor, price_P: Tensor, k_max: int, counts_PB: Tensor) -> None:
    from megatron_anyexperts.moe import price_kernels

    tokens, experts = value_TE.shape
    if tokens:
        price_kernels.count_margins[_grid(tokens)](
            value_TE, slots_T, price_P, counts_PB, tokens, E=experts, E2=_power(experts), L=experts // len(price_P),
            K=k_max, LEVELS=rounds.LEVELS, FIRST_LEVEL=rounds.FIRST_LEVEL, TOKENS=TOKENS,
        )  # fmt: skip


def _next_prices(price_P: Tensor, counts_PB: Tensor, cap: int, slots: int, number: int) -> Tensor:
    from megatron_anyexperts.moe import price_kernels

    ranks, bins = counts_PB.shape
    found_P, above_PB = torch.empty_like(price_P), counts_PB.new_empty(ranks, bins + 1)
    price_kernels.next_prices[(1,)](
        price_P, counts_PB, above_PB, found_P, cap, rounds.aim_at(cap, slots, ranks, number), slots,
        int(number < rounds.FREE_ROUNDS), rounds.shift_from(slots, number), P=ranks,
        P2=_power(ranks), LEVELS=rounds.LEVELS, FIRST_LEVEL=rounds.FIRST_LEVEL, RANKS=min(RANKS, _power(ranks)),
    )  # fmt: skip
    return found_P


def _choose(
    value_TE: Tensor, slots_T: Tensor, price_P: Tensor, routed_TE: Tensor, k_max: int
) -> tuple[Tensor, Tensor]:
    from megatron_anyexperts.moe import price_kernels

    tokens, experts = value_TE.shape
    map_TE, moved_T = torch.empty_like(value_TE, dtype=torch.bool), torch.empty_like(slots_T)
    if tokens:
        price_kernels.choose[_grid(tokens)](
            value_TE, slots_T, price_P, routed_TE.contiguous(), map_TE, moved_T, tokens, E=experts, E2=_power(experts),
            L=experts // len(price_P), K=k_max, TOKENS=TOKENS,
        )  # fmt: skip
    return map_TE, moved_T


_library = torch.library.Library("anyexperts", "FRAGMENT")
for name, schema, function in (
    ("offer", "Tensor gates, Tensor other, Tensor map, Tensor eligible, Tensor importance) -> (Tensor, Tensor", _offer),
    ("count_margins", "Tensor value, Tensor slots, Tensor price, int k_max, Tensor(a!) counts) -> (", _count_margins),
    ("next_prices", "Tensor price, Tensor counts, int cap, int slots, int number) -> (Tensor", _next_prices),
    ("choose", "Tensor value, Tensor slots, Tensor price, Tensor routed, int k_max) -> (Tensor, Tensor", _choose),
):
    _library.define(f"{name}({schema})")
    _library.impl(name, function, "CompositeExplicitAutograd")

offer, count_margins, next_prices, choose = (
    getattr(torch.ops.anyexperts, name) for name in ("offer", "count_margins", "next_prices", "choose")
)
