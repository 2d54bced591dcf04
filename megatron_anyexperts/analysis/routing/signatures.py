"""Routing signatures: how often a prompt uses each expert of each layer, and how alike those of one task are.

After arXiv 2603.11114: OLMoE-1B-7B-0125-Instruct, four categories: within 0.8435 +- 0.0879, across 0.6225 +- 0.1687, d
1.44. That the similarity is the cosine of all layers together is a lead, not confirmed from the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_anyexperts.analysis.routing.chance import random_routing
from megatron_anyexperts.analysis.routing.intervals import DRAWS, Measured, summed_up


@dataclass(frozen=True)
class Similarity:
    """Cosines of pairs of signatures.

    Attributes:
        within, across: mean over the pairs of one task, and of two.
        within_std, across_std: standard deviations over those pairs.
    """

    within: float
    across: float
    within_std: float
    across_std: float
    within_pairs: int
    across_pairs: int

    @property
    def effect(self) -> float:
        """Cohen's d, with the variance pooled over all pairs; it gives 1.44 for the published moments."""
        freedom = self.within_pairs + self.across_pairs - 2
        squares = (self.within_pairs - 1) * self.within_std**2 + (self.across_pairs - 1) * self.across_std**2
        return (self.within - self.across) / np.sqrt(squares / freedom) if freedom > 0 and squares else float("nan")


def signatures(active_LNE: np.ndarray, sample_N: np.ndarray, samples: int) -> np.ndarray:
    """[P, L, E]: share of a sample's tokens for which an expert of a layer is active."""
    counts_P = np.bincount(sample_N, minlength=samples)
    sums_LPE = np.zeros((len(active_LNE), samples, active_LNE.shape[2]))
    order = np.argsort(sample_N, kind="stable")
    starts = np.searchsorted(sample_N[order], np.arange(samples))
    filled = counts_P > 0
    for layer, active_NE in enumerate(active_LNE):
        sums_LPE[layer, filled] = np.add.reduceat(active_NE[order].astype(np.int64), starts[filled], axis=0)
    return (sums_LPE / np.maximum(counts_P, 1)[None, :, None]).transpose(1, 0, 2)


def cosines(signatures_PLE: np.ndarray) -> np.ndarray:
    """[P, P] cosine similarity of whole signatures; 0 with one that is all 0."""
    flat = signatures_PLE.reshape(len(signatures_PLE), -1)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    flat = flat / np.where(norms > 0, norms, 1)
    return flat @ flat.T


def similarity(cosines_PP: np.ndarray, tasks_P: np.ndarray, drawn_P: np.ndarray | None = None) -> Similarity:
    """Split the pairs by whether their tasks are one.

    Args:
        cosines_PP: of all samples.
        tasks_P: task of each.
        drawn_P: samples to pair, as the bootstrap draws them; a sample makes no pair with itself. None: all.
    """
    drawn_P = np.arange(len(tasks_P)) if drawn_P is None else drawn_P
    one, other = np.triu_indices(len(drawn_P), 1)
    one, other = drawn_P[one], drawn_P[other]
    one, other = one[one != other], other[one != other]
    values, same = cosines_PP[one, other], tasks_P[one] == tasks_P[other]
    within, across = values[same], values[~same]
    spread = [part.std(ddof=1) if len(part) > 1 else float("nan") for part in (within, across)]
    means = [part.mean() if len(part) else float("nan") for part in (within, across)]
    return Similarity(*map(float, means), *map(float, spread), len(within), len(across))


def measure_similarity(
    active_LNE: np.ndarray, sample_N: np.ndarray, tasks_P: np.ndarray, seed: int = 0
) -> dict[str, Measured]:
    """Similarity within and across tasks, their difference and its effect size.

    The baseline of the difference and of the effect is the same signatures under permuted tasks; that of the
    similarities themselves is balanced random routing, with every token's own number of experts.
    """
    generator = np.random.default_rng(seed)
    tasks_P = np.unique(tasks_P, return_inverse=True)[1]
    count = len(tasks_P)
    cosines_PP = cosines(signatures(active_LNE, sample_N, count))
    value = _figures(similarity(cosines_PP, tasks_P))
    resampled = [_figures(similarity(cosines_PP, tasks_P, generator.integers(0, count, count))) for _ in range(DRAWS)]
    permuted = [_figures(similarity(cosines_PP, generator.permutation(tasks_P))) for _ in range(DRAWS)]
    balanced = []
    for _ in range(5):  # each draw routes all tokens anew, and hardly differs from the others
        drawn = np.stack([random_routing(a.sum(1), a.shape[1], generator) for a in active_LNE])
        balanced.append(_figures(similarity(cosines(signatures(drawn, sample_N, count)), tasks_P)))
    result = {}
    for name in value:
        nulls, baseline = (permuted, "permuted tasks")
        if name in ("within", "across"):
            nulls, baseline = (balanced, "balanced random routing")
        drawn = ([one[name] for one in each] for each in (resampled, nulls))
        result[name] = summed_up(value[name], *drawn, baseline)
    return result


def _figures(found: Similarity) -> dict[str, float]:
    return {
        "within": found.within,
        "across": found.across,
        "within - across": found.within - found.across,
        "effect size d": float(found.effect),
    }
