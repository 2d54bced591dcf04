"""Which tokens take part and how many slots each gets, before a budget takes some back; `slots.py` defines it.

MASK: 0 none, 1 bool (true for padding), 2 weights. GRADIENT: see `route_kernels`.
"""

import triton
import triton.language as tl


@triton.jit
def taking_part(real, virtual, importance, here, token, mask_ptr, MASK: tl.constexpr):
    """Which tokens are finite, and what they weigh: 0 for those that take no part."""
    total = tl.sum(real, 1) + tl.sum(virtual, 1) + importance
    finite = total - total == 0.0
    weight = finite.to(tl.float32)
    if MASK == 1:
        weight = tl.where(tl.load(mask_ptr + token, here, 1) != 0, 0.0, weight)
    if MASK == 2:
        weight = tl.load(mask_ptr + token, here, 0.0) * weight
    return finite, tl.where(here, weight, 0.0)


@triton.jit
def wanted_slots(importance, offset, K_MIN: tl.constexpr, K_MAX: tl.constexpr, GRADIENT: tl.constexpr):
    """Continuous and integer slots."""
    soft = K_MIN + (K_MAX - K_MIN) * tl.minimum(tl.maximum(importance + offset, 0.0), 1.0)
    return soft, tl.ceil(soft) if GRADIENT == 0 else tl.floor(soft + 0.5)


@triton.jit
def token_slots(
    logits_ptr, importance_ptr, mask_ptr, offset_ptr, slots_ptr, clean_ptr, valid_ptr,
    T, stride,
    C: tl.constexpr, C2: tl.constexpr, K_MIN: tl.constexpr, K_MAX: tl.constexpr, GRADIENT: tl.constexpr,
    MASK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Slots (int64, 0 for who takes no part) and importance without NaN, for `slots.trim_to_budget`."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = token < T
    column = tl.arange(0, C2)[None, :]
    row = token.to(tl.int64)[:, None] * stride
    logits = tl.load(logits_ptr + row + column, here[:, None] & (column < C), 0.0).to(tl.float32)
    importance = tl.load(importance_ptr + token, here, 0.5)
    finite, weight = taking_part(logits, tl.zeros([TOKENS, 1], tl.float32), importance, here, token, mask_ptr, MASK)
    importance = tl.where(finite, importance, 0.5)
    _, slots = wanted_slots(importance, tl.load(offset_ptr), K_MIN, K_MAX, GRADIENT)
    tl.store(slots_ptr + token, tl.where(weight > 0.0, slots, 0.0).to(tl.int64), here)
    tl.store(clean_ptr + token, importance, here)
    tl.store(valid_ptr + token, weight > 0.0, here)
