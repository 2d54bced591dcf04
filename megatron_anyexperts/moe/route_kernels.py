"""One kernel from logits and importance to gates and slots, and one for its gradient.

`slots.py` and `scores.py` define what they compute, and `tests/unit/moe/test_fused_route.py` holds them to it.

A program works on a few tokens and all columns. It never gathers: each column gets the slot it enters in where it is.

SCORE: 0 softmax after the choice, 1 softmax before it, 2 sigmoid, 3 sqrtsoftplus. GRADIENT of the slot count:
0 fractional, 1 straight-through, 2 none. MASK: 0 none, 1 bool, 2 weights. E2, V2, G2: powers of two that hold as many.
TRIMMED: slots are given. Z: with the sum of the z-loss. CENTRED: with what the gates leave of importance's gradient.
"""

import triton
import triton.language as tl

from megatron_anyexperts.moe.score_kernels import best_groups, derivative, pointwise, scores, softmax
from megatron_anyexperts.moe.slots_kernel import taking_part, wanted_slots

# Columns of the sums that each program leaves.
SUMS = ("importance", "importance_squared", "soft", "slots", "tokens", "slots", "real", "movable", "weight", "z")
_COLUMNS = tl.constexpr(len(SUMS))
_NEVER = tl.constexpr(1e9)


@triton.jit
def route_forward(
    logits_ptr, importance_ptr, mask_ptr, given_ptr, offset_ptr, virtual_bias_ptr, expert_bias_ptr, real_first_ptr,
    virtual_first_ptr, gates_ptr, map_ptr, probs_ptr, virtual_gate_ptr, virtual_used_ptr, last_ptr, clean_ptr,
    soft_ptr, slots_ptr, weight_ptr, valid_ptr, broken_ptr, sums_ptr,
    T, stride,
    E: tl.constexpr, E2: tl.constexpr, V: tl.constexpr, V2: tl.constexpr, MOST_VIRTUAL: tl.constexpr,
    K_MIN: tl.constexpr, K_MAX: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, KEEP: tl.constexpr,
    PER: tl.constexpr, SCORE: tl.constexpr, GRADIENT: tl.constexpr, SCALE: tl.constexpr, MASK: tl.constexpr,
    BIASED: tl.constexpr, PROBS: tl.constexpr, TRIMMED: tl.constexpr, Z: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = token < T
    column = tl.arange(0, E2)[None, :]
    virtual_column = tl.arange(0, V2)[None, :]
    in_real = here[:, None] & (column < E)
    in_virtual = here[:, None] & (virtual_column < V)
    row = token.to(tl.int64)[:, None] * stride
    real = tl.load(logits_ptr + row + column, in_real, 0.0).to(tl.float32)
    virtual = tl.load(logits_ptr + row + E + virtual_column, in_virtual, 0.0).to(tl.float32)
    importance = tl.load(importance_ptr + token, here, 0.5)

    # Which tokens take part.
    finite, weight = taking_part(real, virtual, importance, here, token, mask_ptr, MASK)
    valid = weight > 0.0
    real = tl.where(finite[:, None], real, 0.0)
    virtual = tl.where(finite[:, None], virtual, 0.0)
    importance = tl.where(finite, importance, 0.5)

    # How many slots.
    soft, slots = wanted_slots(importance, tl.load(offset_ptr), K_MIN, K_MAX, GRADIENT)
    if TRIMMED:
        slots = tl.load(given_ptr + token, here, 0).to(tl.float32)
    filled = tl.maximum(slots, 1.0)

    # What columns are ranked by.
    score, virtual_score = scores(real, virtual, in_real, in_virtual, SCORE)
    selection = score
    if BIASED:
        selection = selection + tl.load(expert_bias_ptr + column, column < E, 0.0)
    selection = tl.where(in_real, selection, -float("inf"))
    if KEEP > 0:
        allowed = best_groups(selection, column, E, G, G2, KEEP, PER)
        selection = tl.where(allowed, selection, -float("inf"))
    virtual_bias = tl.load(virtual_bias_ptr)
    if SCORE == 0:
        virtual_selection = virtual + virtual_bias
    elif SCORE == 1:
        virtual_selection = virtual_score * tl.exp(virtual_bias)
    else:
        virtual_selection = pointwise(virtual + virtual_bias, SCORE)

    # The best virtual columns; the others never win.
    rest = tl.where(in_virtual, virtual_selection, -float("inf"))
    rank = tl.zeros([TOKENS, V2], tl.float32)
    first = tl.zeros([TOKENS, V2], tl.float32)
    candidate = rank > 0.0
    for r in tl.static_range(MOST_VIRTUAL):
        chosen = virtual_column == tl.argmax(rest, 1)[:, None]
        rank = tl.where(chosen, r + 1.0, rank)
        first = tl.where(chosen, tl.load(virtual_first_ptr + r), first)
        candidate = candidate | chosen
        rest = tl.where(chosen, -float("inf"), rest)

    # The slot that each column enters in.
    entry = tl.zeros([TOKENS, E2], tl.float32) + _NEVER
    not_behind = tl.zeros([TOKENS, V2], tl.float32)
    for i in range(K_MAX):
        best = tl.max(selection, 1)
        enters_here = column == tl.argmax(selection, 1)[:, None]
        ahead = candidate & (virtual_selection > best[:, None])
        enters = tl.sum(ahead.to(tl.float32), 1) + (i + 1.0)
        if MOST_VIRTUAL > 0:
            enters = tl.minimum(enters, tl.load(real_first_ptr + i))
        entry = tl.where(enters_here, enters[:, None], entry)
        selection = tl.where(enters_here, -float("inf"), selection)
        not_behind += 1.0 - (virtual_selection > best[:, None]).to(tl.float32)
    virtual_entry = tl.where(candidate, tl.maximum(rank + not_behind, first), _NEVER)

    # Gates.
    used = in_real & (entry <= filled[:, None])
    virtual_used = in_virtual & (virtual_entry <= filled[:, None])
    is_last = used & (entry == filled[:, None])
    virtual_last = virtual_used & (virtual_entry == filled[:, None])
    last = tl.minimum(soft - (filled - 1.0), 1.0) if GRADIENT == 0 else tl.zeros([TOKENS], tl.float32) + 1.0
    factor = tl.where(is_last, last[:, None], 1.0)
    virtual_factor = tl.where(virtual_last, last[:, None], 1.0)
    if SCORE == 0:
        top = tl.maximum(
            tl.max(tl.where(used, real, -float("inf")), 1), tl.max(tl.where(virtual_used, virtual, -float("inf")), 1)
        )
        value = tl.where(used, tl.exp(tl.where(used, real, 0.0) - top[:, None]) * factor, 0.0)
        virtual_value = tl.where(
            virtual_used, tl.exp(tl.where(virtual_used, virtual, 0.0) - top[:, None]) * virtual_factor, 0.0
        )
        norm = tl.sum(value, 1) + tl.sum(virtual_value, 1)
    else:
        value = tl.where(used, score * factor, 0.0)
        virtual_value = tl.where(virtual_used, virtual_score * virtual_factor, 0.0)
        norm = tl.sum(value, 1) + tl.sum(virtual_value, 1) + 1e-20
    scale = tl.where(valid, SCALE, 0.0)
    if SCORE != 1 and K_MAX > 1:
        scale = scale / norm
    used = used & valid[:, None]
    out = token.to(tl.int64)[:, None] * E + column
    tl.store(gates_ptr + out, value * scale[:, None], in_real)
    tl.store(map_ptr + out, used, in_real)
    if PROBS:
        if SCORE < 2:
            top = tl.max(tl.where(in_real, real, -float("inf")), 1)
            probs = tl.where(in_real, tl.exp(real - top[:, None]), 0.0)
            probs = probs / tl.sum(probs, 1)[:, None]
        else:
            probs = score / (tl.sum(score, 1) + 1e-20)[:, None]
        tl.store(probs_ptr + out, tl.where(valid[:, None], probs, 0.0), in_real)
    virtual_used = virtual_used & valid[:, None]
    tl.store(virtual_gate_ptr + token, tl.sum(virtual_value, 1) * scale, here)
    tl.store(virtual_used_ptr + token[:, None] * V + virtual_column, virtual_used, in_virtual)
    place = tl.sum(tl.where(is_last, column + 1, 0), 1) + tl.sum(tl.where(virtual_last, E + virtual_column + 1, 0), 1)
    tl.store(last_ptr + token, place - 1, here)

    slots = tl.where(valid, slots, 0.0)
    tl.store(clean_ptr + token, importance, here)
    tl.store(soft_ptr + token, soft, here)
    tl.store(slots_ptr + token, slots.to(tl.int64), here)
    tl.store(weight_ptr + token, weight, here)
    tl.store(valid_ptr + token, valid, here)
    tl.store(broken_ptr + token, finite == 0, here)
    counted = valid.to(tl.float32)
    centred = (importance - 0.5) * counted
    movable = valid & (soft > K_MIN) & (soft < K_MAX)
    sums_ptr += tl.program_id(0) * _COLUMNS
    tl.store(sums_ptr, tl.sum(centred, 0))
    tl.store(sums_ptr + 1, tl.sum(centred * centred, 0))
    tl.store(sums_ptr + 2, tl.sum(soft * counted, 0))
    tl.store(sums_ptr + 3, tl.sum(slots, 0))
    tl.store(sums_ptr + 4, tl.sum(counted, 0))
    tl.store(sums_ptr + 5, tl.sum(slots, 0))
    tl.store(sums_ptr + 6, tl.sum(tl.sum(used.to(tl.float32), 1), 0))
    tl.store(sums_ptr + 7, tl.sum(movable.to(tl.float32), 0))
    tl.store(sums_ptr + 8, tl.sum(weight, 0))
    squares = tl.zeros([TOKENS], tl.float32)
    if Z:
        _, _, size = softmax(real, virtual, in_real, in_virtual)
        squares = size * size * weight
    tl.store(sums_ptr + 9, tl.sum(squares, 0))


@triton.jit
def route_backward(
    logits_ptr, clean_ptr, soft_ptr, slots_ptr, weight_ptr, broken_ptr, map_ptr, virtual_used_ptr, last_ptr, offset_ptr,
    d_gates_ptr, d_virtual_gate_ptr, d_probs_ptr, d_sums_ptr,
    d_logits_ptr, d_importance_ptr, from_gates_ptr,
    T, stride, out_stride,
    E: tl.constexpr, E2: tl.constexpr, V: tl.constexpr, V2: tl.constexpr, COLUMNS: tl.constexpr,
    K_MIN: tl.constexpr, K_MAX: tl.constexpr, SCORE: tl.constexpr, GRADIENT: tl.constexpr, SCALE: tl.constexpr,
    PROBS: tl.constexpr, Z: tl.constexpr, CENTRED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = token < T
    column = tl.arange(0, E2)[None, :]
    virtual_column = tl.arange(0, V2)[None, :]
    in_real = here[:, None] & (column < E)
    in_virtual = here[:, None] & (virtual_column < V)
    broken = tl.load(broken_ptr + token, here, 0) != 0
    weight = tl.load(weight_ptr + token, here, 0.0)
    valid = weight > 0.0
    whole = (here & (broken == 0))[:, None]
    row = token.to(tl.int64)[:, None] * stride
    real = tl.load(logits_ptr + row + column, in_real & whole, 0.0).to(tl.float32)
    virtual = tl.load(logits_ptr + row + E + virtual_column, in_virtual & whole, 0.0).to(tl.float32)
    at = token.to(tl.int64)[:, None] * E + column
    used = tl.load(map_ptr + at, in_real, 0) != 0
    virtual_used = tl.load(virtual_used_ptr + token[:, None] * V + virtual_column, in_virtual, 0) != 0
    place = tl.load(last_ptr + token, here, -1)[:, None]
    soft = tl.load(soft_ptr + token, here, 1.0)
    filled = tl.maximum(tl.load(slots_ptr + token, here, 1).to(tl.float32), 1.0)

    d_gate = tl.where(used, tl.load(d_gates_ptr + at, in_real, 0.0), 0.0) * SCALE
    d_virtual = tl.load(d_virtual_gate_ptr + token, here, 0.0)[:, None] * SCALE
    d_virtual = tl.where(virtual_used, d_virtual, 0.0)
    is_last, virtual_last = used & (column == place), virtual_used & (E + virtual_column == place)
    last = tl.minimum(soft - (filled - 1.0), 1.0) if GRADIENT == 0 else tl.zeros([TOKENS], tl.float32) + 1.0
    factor = tl.where(is_last, last[:, None], 1.0)
    virtual_factor = tl.where(virtual_last, last[:, None], 1.0)
    score, virtual_score = scores(real, virtual, in_real, in_virtual, SCORE)

    # From gates to scores (for post-softmax to logits), and to the factor of the last slot.
    if SCORE == 0:
        top = tl.maximum(
            tl.max(tl.where(used, real, -float("inf")), 1), tl.max(tl.where(virtual_used, virtual, -float("inf")), 1)
        )
        top = tl.where(valid, top, 0.0)
        part = tl.where(used, tl.exp(tl.where(used, real, 0.0) - top[:, None]), 0.0)
        virtual_part = tl.where(virtual_used, tl.exp(tl.where(virtual_used, virtual, 0.0) - top[:, None]), 0.0)
        norm = tl.sum(part * factor, 1) + tl.sum(virtual_part * virtual_factor, 1)
        norm = tl.where(valid, norm, 1.0)
        part, virtual_part = part / norm[:, None], virtual_part / norm[:, None]
    else:
        part, virtual_part = score, virtual_score
        norm = tl.sum(tl.where(used, score * factor, 0.0), 1)
        norm += tl.sum(tl.where(virtual_used, virtual_score * virtual_factor, 0.0), 1) + 1e-20
    if SCORE != 1 and K_MAX > 1:
        share = tl.sum(d_gate * part * factor, 1) + tl.sum(d_virtual * virtual_part * virtual_factor, 1)
        if SCORE != 0:
            share = share / norm
        d_gate = tl.where(used, d_gate - share[:, None], 0.0)
        d_virtual = tl.where(virtual_used, d_virtual - share[:, None], 0.0)
        if SCORE != 0:
            d_gate, d_virtual = d_gate / norm[:, None], d_virtual / norm[:, None]
    d_last = tl.sum(tl.where(is_last, d_gate * part, 0.0), 1)
    d_last += tl.sum(tl.where(virtual_last, d_virtual * virtual_part, 0.0), 1)
    if GRADIENT == 0:  # a slot that stands behind others which a budget took is whole
        d_last = tl.where(soft - (filled - 1.0) > 1.0, 0.0, d_last)
    if SCORE == 0:
        d_real, d_virtual = d_gate * part * factor, d_virtual * virtual_part * virtual_factor
    else:
        d_real, d_virtual = d_gate * factor, d_virtual * virtual_factor
    if PROBS:
        d_probs = tl.where(valid[:, None], tl.load(d_probs_ptr + at, in_real, 0.0), 0.0)
        if SCORE >= 2:
            total = tl.sum(score, 1) + 1e-20
            mean = tl.sum(d_probs * score, 1) / total
            d_real += tl.where(in_real, (d_probs - mean[:, None]) / total[:, None], 0.0)
    if SCORE == 1:
        mean = tl.sum(d_real * score, 1) + tl.sum(d_virtual * virtual_score, 1)
        d_real, d_virtual = score * (d_real - mean[:, None]), virtual_score * (d_virtual - mean[:, None])
    if SCORE >= 2:
        d_real = tl.where(in_real, d_real * derivative(real, score, SCORE), 0.0)
        d_virtual = tl.where(in_virtual, d_virtual * derivative(virtual, virtual_score, SCORE), 0.0)
    if PROBS and SCORE < 2:
        top = tl.max(tl.where(in_real, real, -float("inf")), 1)
        probs = tl.where(in_real, tl.exp(real - top[:, None]), 0.0)
        probs = probs / tl.where(here, tl.sum(probs, 1), 1.0)[:, None]
        d_real += probs * (d_probs - tl.sum(d_probs * probs, 1)[:, None])
    if Z:
        part, virtual_part, size = softmax(real, virtual, in_real, in_virtual)
        d_size = (2.0 * tl.load(d_sums_ptr + 9) * size * weight)[:, None]
        d_real, d_virtual = d_real + d_size * part, d_virtual + d_size * virtual_part
    d_real = tl.where(whole & valid[:, None], d_real, 0.0)
    d_virtual = tl.where(whole & valid[:, None], d_virtual, 0.0)
    out = token.to(tl.int64)[:, None] * out_stride
    tl.store(d_logits_ptr + out + column, d_real, in_real)
    # Columns that only fill the product up get 0.
    tl.store(d_logits_ptr + out + E + virtual_column, d_virtual, here[:, None] & (E + virtual_column < COLUMNS))

    # From soft slots to importance.
    importance = tl.load(clean_ptr + token, here, 0.5)
    inside = importance + tl.load(offset_ptr)
    slope = tl.where((inside >= 0.0) & (inside <= 1.0), K_MAX - K_MIN, 0.0)
    counted = (valid & (broken == 0)).to(tl.float32)
    from_gates = tl.zeros([TOKENS], tl.float32)
    if GRADIENT != 2:
        from_gates = tl.where(here, d_last * slope * counted, 0.0)
    if CENTRED:
        tl.store(from_gates_ptr + tl.program_id(0), tl.sum(from_gates, 0))
    d_importance = tl.load(d_sums_ptr) + 2.0 * (importance - 0.5) * tl.load(d_sums_ptr + 1)
    d_importance += tl.load(d_sums_ptr + 2) * slope
    tl.store(d_importance_ptr + token, d_importance * counted + from_gates, here)
