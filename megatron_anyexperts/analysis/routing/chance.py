"""Baselines: routing without preference, and labels without meaning."""

from __future__ import annotations

import numpy as np

_CHUNK = 1 << 22


def random_routing(
    real_N: np.ndarray, experts: int, generator: np.random.Generator, load_E: np.ndarray | None = None
) -> np.ndarray:
    """Give each token as many different experts as it has, at random.

    Args:
        real_N: real slots of each token.
        experts: E.
        generator: of the draw.
        load_E: the experts' shares of slots, which the draw follows: without replacement, one after the other, in
            proportion. None: balanced, each set of experts as likely as any.

    Returns:
        bool [N, E].
    """
    active_NE = np.zeros((len(real_N), experts), bool)
    most = int(real_N.max(initial=0))
    if not most:
        return active_NE
    rate_E = np.ones(experts, np.float32) if load_E is None else (load_E / load_E.sum()).astype(np.float32)
    rows = max(1, _CHUNK // experts)
    for start in range(0, len(real_N), rows):
        part = slice(start, start + rows)
        # The first k of exponential clocks that run at these rates are such a draw.
        with np.errstate(divide="ignore"):
            times = generator.standard_exponential((len(real_N[part]), experts), dtype=np.float32) / rate_E
        first = np.argpartition(times, min(most, experts - 1), axis=1)[:, :most]
        first = np.take_along_axis(first, np.argsort(np.take_along_axis(times, first, 1), axis=1), 1)
        np.put_along_axis(active_NE[part], first, np.arange(most) < real_N[part, None], axis=1)
    return active_NE


def permuted_within(values_N: np.ndarray, group_N: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Permute values among the members of each group."""
    order, result = np.argsort(group_N, kind="stable"), np.empty_like(values_N)
    shuffled = np.lexsort((generator.random(len(values_N)), group_N))
    result[order] = values_N[shuffled]
    return result
