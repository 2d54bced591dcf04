"""Scores of real and virtual columns, and the best groups by them, as parts of kernels; `scores.py` defines them.

SCORE: see `route_kernels`.
"""

import triton
import triton.language as tl


@triton.jit
def pointwise(x, SCORE: tl.constexpr):
    if SCORE == 2:
        return tl.sigmoid(x)
    else:
        # softplus, as torch takes it: x itself above 20
        return tl.sqrt(tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0)))))


@triton.jit
def derivative(x, score, SCORE: tl.constexpr):
    if SCORE == 2:
        return score * (1.0 - score)
    else:
        return tl.where(x > 20.0, 1.0, tl.sigmoid(x)) / (2.0 * score)


@triton.jit
def scores(real, virtual, in_real, in_virtual, SCORE: tl.constexpr):
    """Scores of real and virtual columns; 0 outside."""
    if SCORE == 0:
        score, virtual_score = real, virtual
    elif SCORE == 1:
        top = tl.maximum(
            tl.max(tl.where(in_real, real, -float("inf")), 1), tl.max(tl.where(in_virtual, virtual, -float("inf")), 1)
        )
        score = tl.exp(real - top[:, None])
        virtual_score = tl.exp(virtual - top[:, None])
        total = tl.sum(tl.where(in_real, score, 0.0), 1) + tl.sum(tl.where(in_virtual, virtual_score, 0.0), 1)
        score = score / total[:, None]
        virtual_score = virtual_score / total[:, None]
    else:
        score, virtual_score = pointwise(real, SCORE), pointwise(virtual, SCORE)
    return tl.where(in_real, score, 0.0), tl.where(in_virtual, virtual_score, 0.0)


@triton.jit
def best_groups(
    selection, column, E: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, KEEP: tl.constexpr, PER: tl.constexpr
):
    """Columns of the KEEP groups whose best PER columns have the largest sum."""
    group = column // (E // G)
    number = tl.arange(0, G2)[None, :]
    score = tl.where(number < G, 0.0, -float("inf")) + tl.zeros([selection.shape[0], 1], tl.float32)
    for g in range(G):
        rest = tl.where(group == g, selection, -float("inf"))
        for _ in tl.static_range(PER):
            best = tl.max(rest, 1)
            place = tl.argmax(rest, 1)
            score = tl.where(number == g, score + best[:, None], score)
            rest = tl.where(column == place[:, None], -float("inf"), rest)
    allowed = tl.zeros(selection.shape, tl.int1)
    for _ in range(KEEP):
        chosen = tl.argmax(score, 1)
        allowed = allowed | (group == chosen[:, None])
        score = tl.where(number == chosen[:, None], -float("inf"), score)
    return allowed


@triton.jit
def softmax(real, virtual, in_real, in_virtual):
    """Softmax over all columns, and the logarithm of its sum."""
    top = tl.maximum(
        tl.max(tl.where(in_real, real, -float("inf")), 1), tl.max(tl.where(in_virtual, virtual, -float("inf")), 1)
    )
    top = tl.where(top > -float("inf"), top, 0.0)
    part = tl.where(in_real, tl.exp(real - top[:, None]), 0.0)
    virtual_part = tl.where(in_virtual, tl.exp(virtual - top[:, None]), 0.0)
    total = tl.sum(part, 1) + tl.sum(virtual_part, 1)
    total = tl.where(total > 0.0, total, 1.0)
    return part / total[:, None], virtual_part / total[:, None], top + tl.log(total)
