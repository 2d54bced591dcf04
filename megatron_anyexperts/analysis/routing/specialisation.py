"""Whom experts serve: N(expert, domain) / N(domain) and N(token, expert) / N(token), after OLMoE (arXiv 2409.02060)."""

from __future__ import annotations

import numpy as np

from megatron_anyexperts.analysis.routing.chance import permuted_within
from megatron_anyexperts.analysis.routing.intervals import DRAWS, NULL_DRAWS, Measured, measured

LEAST_OCCURRENCES = 10
"""Of a token id that counts for vocabulary specialisation."""


def group_counts(active_NE: np.ndarray, group_N: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """[G, E] tokens of a group for which an expert is active, and [G] tokens of each group."""
    counts_GE = np.zeros((groups, active_NE.shape[1]))
    order = np.argsort(group_N, kind="stable")
    sizes_G = np.bincount(group_N, minlength=groups)
    filled = np.flatnonzero(sizes_G)
    if len(filled):
        starts = np.concatenate(([0], np.cumsum(sizes_G)))[filled]
        counts_GE[filled] = np.add.reduceat(active_NE[order].astype(np.int64), starts, axis=0)
    return counts_GE, sizes_G


def shares(counts_GE: np.ndarray, sizes_G: np.ndarray) -> np.ndarray:
    """[G, E] N(expert, group) / N(group); NaN for groups without a token."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts_GE / sizes_G[:, None]


def spread(shares_GE: np.ndarray) -> float:
    """Mean over experts of the standard deviation of their shares over groups: 0 where all groups are served alike."""
    present = shares_GE[np.isfinite(shares_GE).all(1)]
    return float(present.std(axis=0).mean()) if len(present) else float("nan")


def measure_domains(
    active_NE: np.ndarray, sample_N: np.ndarray, group_P: np.ndarray, seed: int = 0
) -> Measured:
    """`spread` over the domains of samples, beside the same samples with permuted domains.

    Args:
        active_NE: of one layer.
        sample_N: sample of each token.
        group_P: number of each sample's domain.
        seed: of all draws.
    """
    samples, groups = len(group_P), int(group_P.max(initial=-1)) + 1
    counts_PE, sizes_P = group_counts(active_NE, sample_N, samples)

    def figure(drawn: np.ndarray, group_P: np.ndarray = group_P) -> float:
        counts_GE, sizes_G = np.zeros((groups, counts_PE.shape[1])), np.zeros(groups)
        np.add.at(counts_GE, group_P[drawn], counts_PE[drawn])
        np.add.at(sizes_G, group_P[drawn], sizes_P[drawn])
        return spread(shares(counts_GE, sizes_G))

    generator, whole = np.random.default_rng(seed), np.arange(samples)
    nulls = [figure(whole, generator.permutation(group_P)) for _ in range(DRAWS)]
    return measured(figure, samples, nulls, "permuted domains", seed)


def measure_kinds(
    active_NE: np.ndarray, sample_N: np.ndarray, kind_N: np.ndarray, samples: int, seed: int = 0
) -> Measured:
    """`spread` over kinds of tokens, such as modalities, beside kinds permuted among the tokens of each sample.

    A sample of one kind stays as it is in the baseline, so that the figure speaks of kinds, not of samples.
    """
    groups = int(kind_N.max(initial=-1)) + 1

    def by_sample(kind_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts, sizes = group_counts(active_NE, sample_N * groups + kind_N, samples * groups)
        return counts.reshape(samples, groups, -1), sizes.reshape(samples, groups)

    counts_PGE, sizes_PG = by_sample(kind_N)

    generator = np.random.default_rng(seed)
    permuted = (by_sample(permuted_within(kind_N, sample_N, generator)) for _ in range(NULL_DRAWS))
    return measured(
        lambda drawn: spread(shares(counts_PGE[drawn].sum(0), sizes_PG[drawn].sum(0))),
        samples,
        [spread(shares(counts.sum(0), sizes.sum(0))) for counts, sizes in permuted],
        "kinds permuted within samples",
        seed,
    )


def vocabulary(active_NE: np.ndarray, token_N: np.ndarray, least: int = LEAST_OCCURRENCES) -> float:
    """Mean, over token ids with at least `least` occurrences, of the largest N(token, expert) / N(token)."""
    ids, number_N, counts = np.unique(token_N, return_inverse=True, return_counts=True)
    shares_GE = shares(*group_counts(active_NE, number_N, len(ids)))[counts >= least]
    return float(shares_GE.max(axis=1).mean()) if shares_GE.size else float("nan")


def measure_vocabulary(
    active_NE: np.ndarray, sample_N: np.ndarray, token_N: np.ndarray, samples: int, seed: int = 0
) -> Measured:
    """`vocabulary`, beside token ids permuted among all tokens: few occurrences have a largest share by chance too."""
    order = np.argsort(sample_N, kind="stable")
    parts = np.split(order, np.searchsorted(sample_N[order], np.arange(1, samples)))

    def figure(drawn: np.ndarray) -> float:
        rows = np.concatenate([parts[sample] for sample in drawn])
        return vocabulary(active_NE[rows], token_N[rows])

    generator = np.random.default_rng(seed)
    nulls = [vocabulary(active_NE, generator.permutation(token_N)) for _ in range(NULL_DRAWS)]
    return measured(figure, samples, nulls, "permuted token ids", seed)
