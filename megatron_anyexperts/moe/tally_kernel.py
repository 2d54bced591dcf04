"""Routing figures of one microbatch of one layer, added up by one kernel; `Tally.add` defines them."""

import triton
import triton.language as tl


@triton.jit
def _imbalance(load_ptr, P: tl.constexpr, P2: tl.constexpr):
    rank = tl.arange(0, P2)
    load = tl.load(load_ptr + rank, rank < P, 0).to(tl.float64)
    mean = tl.sum(load, 0) / P
    return tl.where(mean > 0, tl.max(load, 0) / tl.where(mean > 0, mean, 1.0), 1.0)


@triton.jit
def add_figures(
    kinds_ptr, slots_ptr, importance_ptr, map_ptr, broken_ptr, received_ptr, demanded_ptr, experts_ptr, rerouted_ptr,
    displaced_ptr, copied_ptr, sums_ptr, to_experts_ptr, load_ptr, peak_ptr, nonfinite_ptr,
    T, kinds_stride,
    E: tl.constexpr, E2: tl.constexpr, P: tl.constexpr, P2: tl.constexpr, M: tl.constexpr, FIELDS: tl.constexpr,
    BINS: tl.constexpr, BINS2: tl.constexpr, BROKEN: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = token < T
    column = tl.arange(0, E2)[None, :]
    kind = tl.load(kinds_ptr + token * kinds_stride, here, -1).to(tl.int32)
    if BROKEN:
        broken = (tl.load(broken_ptr + token, here, 0) != 0) & (kind >= 0)
        tl.atomic_add(nonfinite_ptr, tl.sum(broken.to(tl.float64), 0))
        kind = tl.where(broken, -1, kind)
    slots = tl.load(slots_ptr + token, here, 0).to(tl.int32)
    importance = tl.load(importance_ptr + token, here, 0.0).to(tl.float64)
    used = tl.load(map_ptr + token.to(tl.int64)[:, None] * E + column, here[:, None] & (column < E), 0) != 0
    real = tl.sum(used.to(tl.int32), 1)
    number = tl.arange(0, BINS2)[None, :]
    for kind_number in tl.static_range(M):
        mine = kind == kind_number
        one = mine.to(tl.float64)
        if tl.sum(one, 0) > 0:
            at = sums_ptr + kind_number * FIELDS
            tl.atomic_add(at, tl.sum(one, 0))
            tl.atomic_add(at + 1, tl.sum(one * slots.to(tl.float64), 0))
            tl.atomic_add(at + 2, tl.sum(one * real.to(tl.float64), 0))
            tl.atomic_add(at + 3, tl.sum(one * importance, 0))
            tl.atomic_add(at + 4, tl.sum(one * importance * importance, 0))
            in_bin = (slots[:, None] == number) & mine[:, None]
            tl.atomic_add(at + 5 + tl.arange(0, BINS2), tl.sum(in_bin.to(tl.float64), 0), tl.arange(0, BINS2) < BINS)
            in_bin = (real[:, None] == number) & mine[:, None]
            at += 5 + BINS
            tl.atomic_add(at + tl.arange(0, BINS2), tl.sum(in_bin.to(tl.float64), 0), tl.arange(0, BINS2) < BINS)
    if tl.program_id(0) == 0:
        received, demanded = _imbalance(received_ptr, P, P2), _imbalance(demanded_ptr, P, P2)
        tl.store(load_ptr, tl.load(load_ptr) + 1.0)
        tl.store(load_ptr + 1, tl.load(load_ptr + 1) + received)
        tl.store(load_ptr + 2, tl.load(load_ptr + 2) + demanded)
        tl.store(load_ptr + 3, tl.load(load_ptr + 3) + tl.load(rerouted_ptr).to(tl.float64))
        tl.store(load_ptr + 4, tl.load(load_ptr + 4) + tl.load(displaced_ptr).to(tl.float64))
        tl.store(load_ptr + 5, tl.load(load_ptr + 5) + tl.load(copied_ptr).to(tl.float64))
        tl.store(peak_ptr, tl.maximum(tl.load(peak_ptr), received))
        expert = tl.arange(0, E2)
        before = tl.load(to_experts_ptr + expert, expert < E, 0.0)
        load = tl.load(experts_ptr + expert, expert < E, 0).to(tl.float64)
        tl.store(to_experts_ptr + expert, before + load, expert < E)
