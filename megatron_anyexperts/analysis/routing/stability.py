"""How routing settles from checkpoint to checkpoint: saturation (OLMoE) and fluctuation (StableMoE)."""

from __future__ import annotations

import numpy as np

from megatron_anyexperts.analysis.routing.intervals import NULL_DRAWS, Measured, measured


def saturation_N(active_NE: np.ndarray, final_NE: np.ndarray) -> np.ndarray:
    """Of each token's experts at the end, the share that it had already; NaN without any.

    OLMoE divides by its constant k, which is the number of experts at the end.
    """
    with np.errstate(invalid="ignore"):
        return (active_NE & final_NE).sum(1) / final_NE.sum(1)


def measure_saturation(
    active_NE: np.ndarray, final_NE: np.ndarray, sample_N: np.ndarray, samples: int, seed: int = 0
) -> Measured:
    """Mean saturation of one layer, beside that of each token with another one: what loads and slots alone give."""
    generator = np.random.default_rng(seed)
    permuted = (saturation_N(generator.permutation(active_NE), final_NE) for _ in range(NULL_DRAWS))
    nulls = [float(np.nanmean(each)) for each in permuted]
    return _mean_over_tokens(saturation_N(active_NE, final_NE), sample_N, samples, nulls, seed)


def last_change_N(top_TN: np.ndarray) -> np.ndarray:
    """Number of the last of T checkpoints whose first expert is not that of the end; -1: the token never changes."""
    differs_TN = top_TN != top_TN[-1]
    last = len(top_TN) - 1 - differs_TN[::-1].argmax(0)
    return np.where(differs_TN.any(0), last, -1)


def measure_fluctuation(
    top_TN: np.ndarray, step: int, sample_N: np.ndarray, samples: int, seed: int = 0
) -> Measured:
    """Share of tokens whose first expert, at checkpoint number `step` or later, is not that of the end.

    The baseline permutes the tokens of every checkpoint but the last.
    """
    generator = np.random.default_rng(seed)
    nulls = []
    for _ in range(NULL_DRAWS):
        mixed = [*(generator.permutation(top_N) for top_N in top_TN[:-1]), top_TN[-1]]
        nulls.append(float((last_change_N(np.array(mixed)) >= step).mean()))
    changed_N = (last_change_N(top_TN) >= step).astype(float)
    return _mean_over_tokens(changed_N, sample_N, samples, nulls, seed)


def _mean_over_tokens(
    values_N: np.ndarray, sample_N: np.ndarray, samples: int, nulls: list[float], seed: int
) -> Measured:
    known = np.isfinite(values_N)
    sums = np.bincount(sample_N[known], values_N[known], samples)
    sizes = np.bincount(sample_N[known], minlength=samples)

    def figure(drawn: np.ndarray) -> float:
        return float(sums[drawn].sum() / sizes[drawn].sum()) if sizes[drawn].sum() else float("nan")

    return measured(figure, samples, nulls, "permuted tokens", seed)
