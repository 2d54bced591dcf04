"""Tokens to slots and back, one kernel in each direction and one for each gradient.

A program works on one token. `place` says where its slot of each expert lies, -1 for no slot; sums are in fp32, in the
order of the experts, so a result can be repeated.
"""

import triton
import triton.language as tl


@triton.jit
def _next(place, column, before, E2: tl.constexpr):
    """The first expert behind `before` with a slot, and where that slot lies."""
    expert = tl.min(tl.where((place >= 0) & (column > before), column, E2), 0)
    return expert, tl.sum(tl.where(column == expert, place, 0), 0).to(tl.int64)


@triton.jit
def permute(
    hidden_ptr, gates_ptr, map_ptr, upto_ptr, ends_ptr, counts_ptr, slots_ptr, probs_ptr, place_ptr,
    H, hidden_stride,
    E: tl.constexpr, E2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy a token to its slots; `upto` counts slots of an expert up to this token, `ends` those up to this expert."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, E2)
    inside = column < E
    used = tl.load(map_ptr + token * E + column, inside, 0) != 0
    start = tl.load(ends_ptr + column, inside, 0) - tl.load(counts_ptr + column, inside, 0)
    place = tl.where(used, start + tl.load(upto_ptr + token * E + column, inside, 0) - 1, -1).to(tl.int32)
    tl.store(place_ptr + token * E + column, place, inside)
    tl.store(probs_ptr + place, tl.load(gates_ptr + token * E + column, inside, 0.0), used)
    number = tl.sum(used.to(tl.int32), 0)
    for begin in range(0, H, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        value = tl.load(hidden_ptr + token * hidden_stride + at, at < H)
        expert = -1
        for _ in range(number):
            expert, row = _next(place, column, expert, E2)
            tl.store(slots_ptr + row * H + at, value, at < H)


@triton.jit
def permute_backward(
    d_slots_ptr, d_probs_ptr, place_ptr, d_hidden_ptr, d_gates_ptr,
    H,
    E: tl.constexpr, E2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, E2)
    place = tl.load(place_ptr + token * E + column, column < E, -1)
    tl.store(d_gates_ptr + token * E + column, tl.load(d_probs_ptr + place, place >= 0, 0.0), column < E)
    number = tl.sum((place >= 0).to(tl.int32), 0)
    for begin in range(0, H, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        expert = -1
        for _ in range(number):
            expert, row = _next(place, column, expert, E2)
            total += tl.load(d_slots_ptr + row * H + at, at < H, 0.0).to(tl.float32)
        tl.store(d_hidden_ptr + token * H + at, total.to(d_hidden_ptr.dtype.element_ty), at < H)


@triton.jit
def unpermute(
    slots_ptr, place_ptr, hidden_ptr, gate_ptr, broken_ptr, output_ptr,
    H, hidden_stride,
    E: tl.constexpr, E2: tl.constexpr, VIRTUAL: tl.constexpr, BROKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum a token's slots and its virtual ones; NaN for a token that is not finite."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, E2)
    place = tl.load(place_ptr + token * E + column, column < E, -1)
    number = tl.sum((place >= 0).to(tl.int32), 0)
    for begin in range(0, H, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        expert = -1
        for _ in range(number):
            expert, row = _next(place, column, expert, E2)
            total += tl.load(slots_ptr + row * H + at, at < H, 0.0).to(tl.float32)
        if VIRTUAL:
            hidden = tl.load(hidden_ptr + token * hidden_stride + at, at < H, 0.0).to(tl.float32)
            total += tl.load(gate_ptr + token).to(tl.float32) * hidden
        if BROKEN:
            total = tl.where(tl.load(broken_ptr + token) != 0, float("nan"), total)
        tl.store(output_ptr + token * H + at, total.to(output_ptr.dtype.element_ty), at < H)


@triton.jit
def unpermute_backward(
    d_output_ptr, place_ptr, hidden_ptr, gate_ptr, broken_ptr, d_slots_ptr, d_hidden_ptr, d_gate_ptr,
    H, hidden_stride,
    E: tl.constexpr, E2: tl.constexpr, VIRTUAL: tl.constexpr, BROKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, E2)
    place = tl.load(place_ptr + token * E + column, column < E, -1)
    number = tl.sum((place >= 0).to(tl.int32), 0)
    d_gate = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, H, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        gradient = tl.load(d_output_ptr + token * H + at, at < H, 0.0)
        if BROKEN:
            gradient = tl.where(tl.load(broken_ptr + token) != 0, 0.0, gradient)
        expert = -1
        for _ in range(number):
            expert, row = _next(place, column, expert, E2)
            tl.store(d_slots_ptr + row * H + at, gradient, at < H)
        if VIRTUAL:
            hidden = tl.load(hidden_ptr + token * hidden_stride + at, at < H, 0.0).to(tl.float32)
            d_gate += gradient.to(tl.float32) * hidden
            d_hidden = gradient.to(tl.float32) * tl.load(gate_ptr + token).to(tl.float32)
            tl.store(d_hidden_ptr + token * H + at, d_hidden.to(d_hidden_ptr.dtype.element_ty), at < H)
    if VIRTUAL:
        tl.store(d_gate_ptr + token, tl.sum(d_gate, 0).to(d_gate_ptr.dtype.element_ty))
