"""Which experts are used together: N(i and j) / N(i), after OLMoE (arXiv 2409.02060).

OLMoE's script counts neighbours in the ranking of gates only; this is its formula, over all pairs.
"""

from __future__ import annotations

import numpy as np

from megatron_anyexperts.analysis.routing.chance import random_routing
from megatron_anyexperts.analysis.routing.intervals import NULL_DRAWS, Measured, measured

_BLOCKS = 100


def pair_counts(active_NE: np.ndarray) -> np.ndarray:
    """[E, E] tokens for which both experts are active; each expert's own tokens on the diagonal."""
    active_NE = active_NE.astype(np.float32)
    return (active_NE.T @ active_NE).astype(np.float64)


def coactivation(counts_EE: np.ndarray) -> np.ndarray:
    """[E, E] of `pair_counts`: of the tokens of expert i (row), the share that j has too; NaN in rows without any."""
    own_E = np.diag(counts_EE)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares_EE = counts_EE / own_E[:, None]
    np.fill_diagonal(shares_EE, np.nan)
    return shares_EE


def strongest_partner(counts_EE: np.ndarray) -> float:
    """Mean over experts of the share of their tokens that the most frequent other expert has too."""
    shares_EE = coactivation(counts_EE)[np.diag(counts_EE) > 0]
    return float(np.nanmax(shares_EE, axis=1).mean()) if shares_EE.size else float("nan")


def measure_coactivation(
    active_NE: np.ndarray, sample_N: np.ndarray, samples: int, seed: int = 0
) -> Measured:
    """`strongest_partner` of one layer, beside experts drawn independently with the same loads and slots.

    Resampled are samples, or, of very many, at most `_BLOCKS` groups of them.
    """
    block_N, blocks = sample_N % _BLOCKS, min(samples, _BLOCKS)
    order = np.argsort(block_N, kind="stable")
    parts = np.split(active_NE[order], np.searchsorted(block_N[order], np.arange(1, blocks)))
    counts_BEE = np.stack([pair_counts(part) for part in parts])
    generator, real_N = np.random.default_rng(seed), active_NE.sum(1)
    load_E = active_NE.sum(0).astype(float)
    drawn = (random_routing(real_N, active_NE.shape[1], generator, load_E) for _ in range(NULL_DRAWS))
    return measured(
        lambda drawn: strongest_partner(np.tensordot(np.bincount(drawn, minlength=blocks), counts_BEE, 1)),
        blocks,
        [strongest_partner(pair_counts(each)) for each in drawn],
        "independent experts of the same loads",
        seed,
    )
