"""Kernels of `prices.py`, which defines what they compute; `tests/unit/moe/test_fused_prices.py` holds them to it.

A program works on a few tokens and all columns; `next_prices` is one program. E2, P2: powers of two that hold as many.
"""

import triton
import triton.language as tl


@triton.jit
def offer(
    gates_ptr, fallback_ptr, map_ptr, eligible_ptr, importance_ptr, value_ptr, slots_ptr, T,
    E: tl.constexpr, E2: tl.constexpr, RELATIVE: tl.constexpr, ABSOLUTE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, E2)[None, :]
    here = (token < T)[:, None] & (column < E)
    place = token.to(tl.int64)[:, None] * E + column
    used = tl.load(map_ptr + place, here, 0) != 0
    eligible = tl.load(eligible_ptr + place, here, 0) != 0
    gate = tl.load(gates_ptr + place, here, 0.0).to(tl.float32)
    gate = tl.where(used, gate, tl.load(fallback_ptr + place, here, 0.0).to(tl.float32))
    value = gate * tl.load(importance_ptr + token, token < T, 0.0)[:, None]
    other = tl.max(tl.where(eligible & (used == 0), value, 0.0), 1)
    value = tl.where(used, tl.maximum(value, other[:, None]), value)
    row = ((token.to(tl.int64) * 2654435761 >> 8) & 0xFFFFFF).to(tl.int32)
    apart = (row[:, None] ^ ((column.to(tl.int64) * 2246822519 >> 8) & 0xFFFFFF).to(tl.int32)).to(tl.float32)
    apart = apart * 5.9604644775390625e-08 + tl.where(used, 2.0, 0.0)
    value = value + (value * RELATIVE + ABSOLUTE) * apart
    slots = tl.sum(used.to(tl.int32), 1)
    value = tl.where((used | eligible) & (slots > 0)[:, None], value, -float("inf"))
    tl.store(value_ptr + place, value, here)
    tl.store(slots_ptr + token, slots.to(tl.int64), token < T)


@triton.jit
def _at_prices(value_ptr, slots_ptr, price_ptr, token, column, T, E: tl.constexpr, L: tl.constexpr, K: tl.constexpr):
    """Value less price, that of a token's last slot, of the one after it, and the slots themselves."""
    here = (token < T)[:, None] & (column < E)
    value = tl.load(value_ptr + token.to(tl.int64)[:, None] * E + column, here, -float("inf"))
    net = value - tl.load(price_ptr + column // L, column < E, 0.0)
    slots = tl.load(slots_ptr + token, token < T, 0).to(tl.int32)
    last = tl.full(slots.shape, float("inf"), tl.float32)
    following = last
    chosen = tl.zeros(net.shape, tl.int1)
    rest = net
    for number in tl.static_range(K + 1):
        top = tl.max(rest, 1)
        place = column == tl.argmax(rest, 1)[:, None]
        last = tl.where(number + 1 == tl.maximum(slots, 1), top, last)
        following = tl.where(number == slots, top, following)
        chosen = chosen | (place & (number < slots)[:, None])
        rest = tl.where(place, -float("inf"), rest)
    return net, last, tl.where(slots < E, following, -float("inf")), chosen


@triton.jit
def count_margins(
    value_ptr, slots_ptr, price_ptr, counts_ptr, T,
    E: tl.constexpr, E2: tl.constexpr, L: tl.constexpr, K: tl.constexpr, LEVELS: tl.constexpr,
    FIRST_LEVEL: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, E2)[None, :]
    net, last, following, _ = _at_prices(value_ptr, slots_ptr, price_ptr, token, column, T, E, L, K)
    taken = net > -float("inf")
    net = tl.where(taken, net, 0.0)
    among = net >= last[:, None]
    margin = net - tl.where(among, following[:, None], last[:, None])
    level = (tl.abs(margin).to(tl.int32, bitcast=True) >> 22) - FIRST_LEVEL
    level = tl.minimum(tl.maximum(level, 0), LEVELS - 1)
    place = column // L * (2 * LEVELS) + tl.where(among, LEVELS + level, LEVELS - 1 - level)
    tl.atomic_add(counts_ptr + place, tl.full(place.shape, 1, tl.int64), taken)


@triton.jit
def choose(
    value_ptr, slots_ptr, price_ptr, routed_ptr, map_ptr, moved_ptr, T,
    E: tl.constexpr, E2: tl.constexpr, L: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, E2)[None, :]
    _, _, _, chosen = _at_prices(value_ptr, slots_ptr, price_ptr, token, column, T, E, L, K)
    place, here = token.to(tl.int64)[:, None] * E + column, (token < T)[:, None] & (column < E)
    moved = chosen & (tl.load(routed_ptr + place, here, 1) == 0)
    tl.store(map_ptr + place, chosen, here)
    tl.store(moved_ptr + token, tl.sum(moved.to(tl.int64), 1), token < T)


@triton.jit
def _edge(number, LEVELS: tl.constexpr, FIRST_LEVEL: tl.constexpr):
    """Lower edge of a bin."""
    level = tl.abs(number - LEVELS)
    size = ((level + FIRST_LEVEL) << 22).to(tl.float32, bitcast=True).to(tl.float64)
    size = tl.where(level == 0, 0.0, size)
    return tl.where(number < LEVELS, -size, size)


@triton.jit
def next_prices(
    price_ptr, counts_ptr, above_ptr, found_ptr, cap, aim, slots, free, shift_from,
    P: tl.constexpr, P2: tl.constexpr, LEVELS: tl.constexpr, FIRST_LEVEL: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    B: tl.constexpr = 2 * LEVELS
    rank = tl.arange(0, P2)
    number = tl.arange(0, B)[None, :]
    counts = tl.load(counts_ptr + rank[:, None] * B + number, (rank < P)[:, None], 0)
    # above[b] is the number of margins in bin b and higher; above[B] is 0.
    total = tl.sum(counts, 1)
    above = total[:, None] - tl.cumsum(counts, 1) + counts
    tl.store(above_ptr + rank[:, None] * (B + 1) + number, above, (rank < P)[:, None])
    tl.store(above_ptr + rank * (B + 1) + B, tl.zeros(rank.shape, tl.int64), rank < P)
    tl.debug_barrier()
    passed = tl.sum(((above - counts) > aim).to(tl.int32), 1)
    passed = tl.minimum(passed, B - 1)
    more = tl.load(above_ptr + rank * (B + 1) + passed, rank < P, 0).to(tl.float64)
    less = tl.load(above_ptr + rank * (B + 1) + passed + 1, rank < P, 0).to(tl.float64)
    share = (more - aim) / tl.maximum(more - less, 1.0)
    share = tl.minimum(tl.maximum(share, 0.0), 1.0)
    low = _edge(passed, LEVELS, FIRST_LEVEL)
    rise = low + share * (_edge(passed + 1, LEVELS, FIRST_LEVEL) - low)
    rise = tl.where(total <= aim, -32.0, rise)
    over = tl.sum(tl.maximum(tl.sum(tl.where(number >= LEVELS, counts, 0), 1) - cap, 0), 0)

    # The shift: kept[b] is what all ranks keep when the shift is edge b.
    kept = tl.zeros([B], tl.float64)
    edge = _edge(tl.arange(0, B), LEVELS, FIRST_LEVEL)
    for first in range(0, P2, RANKS):
        some = first + tl.arange(0, RANKS)
        price = tl.load(price_ptr + some, some < P, 0.0).to(tl.float64)
        margin = -price[:, None] - edge[None, :]
        level = (tl.abs(margin.to(tl.float32)).to(tl.int32, bitcast=True) >> 22) - FIRST_LEVEL
        level = tl.minimum(tl.maximum(level, 0), LEVELS - 1)
        in_bin = tl.where(margin >= 0, LEVELS + level, LEVELS - 1 - level)
        place, there = above_ptr + some[:, None] * (B + 1) + in_bin, (some < P)[:, None]
        lower = _edge(in_bin, LEVELS, FIRST_LEVEL)
        part = (margin - lower) / (_edge(in_bin + 1, LEVELS, FIRST_LEVEL) - lower)
        part = tl.minimum(tl.maximum(part, 0.0), 1.0)
        from_here, beyond = tl.load(place, there, 0).to(tl.float64), tl.load(place + 1, there, 0).to(tl.float64)
        kept += tl.sum(tl.minimum(from_here + part * (beyond - from_here), aim), 0)
    after = tl.minimum(tl.maximum(tl.sum((kept < slots).to(tl.int32), 0), 1), B - 1)
    shift_low = _edge(after - 1, LEVELS, FIRST_LEVEL)
    kept_low = tl.sum(tl.where(tl.arange(0, B) == after - 1, kept, 0.0), 0)
    kept_high = tl.sum(tl.where(tl.arange(0, B) == after, kept, 0.0), 0)
    part = (slots - kept_low) / tl.maximum(kept_high - kept_low, 1.0)
    part = tl.minimum(tl.maximum(part, 0.0), 1.0)
    shift = shift_low + part * (_edge(after, LEVELS, FIRST_LEVEL) - shift_low)
    shift = tl.where(over * shift_from > slots, shift, 0.0)
    price = tl.load(price_ptr + rank, rank < P, 0.0)
    found = tl.maximum(price.to(tl.float64) + rise + shift, 0.0).to(tl.float32)
    tl.store(found_ptr + rank, tl.where((over == 0) & (free == 0), price, found), rank < P)
