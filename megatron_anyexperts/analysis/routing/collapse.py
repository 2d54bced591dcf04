"""Whether routing makes representations collapse towards the experts (Chi et al., arXiv 2204.09179; Papyan et al.).

That Chi et al. define the ratio over experts as here is a lead, not confirmed from the text.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_anyexperts.analysis.routing.intervals import Measured, summed_up
from megatron_anyexperts.evaluation.hidden_states import LayerStates

_DRAWS = 20


def scatter_ratio(states_NH: np.ndarray, group_N: np.ndarray) -> float:
    """Tr(S_W S_B^+), scatter within groups over scatter between them: small where groups have collapsed to points.

    Args:
        states_NH: of tokens.
        group_N: the expert of each; tokens below 0 are left out.
    """
    states_NH, group_N = states_NH[group_N >= 0].astype(np.float64), group_N[group_N >= 0]
    groups, group_N, counts_G = np.unique(group_N, return_inverse=True, return_counts=True)
    if len(groups) < 2:
        return float("nan")
    means_GH = np.zeros((len(groups), states_NH.shape[1]))
    np.add.at(means_GH, group_N, states_NH)
    means_GH /= counts_G[:, None]
    between_GH = np.sqrt(counts_G / len(group_N))[:, None] * (means_GH - states_NH.mean(0))
    # S_B is between.T @ between: its pseudo-inverse has these directions, and the squares of these lengths.
    _, lengths, directions = np.linalg.svd(between_GH, full_matrices=False)
    known = lengths > lengths.max() * 1e-6
    known[len(groups) - 1 :] = False  # the weighted means add up to 0: what is left there is rounding
    within_ND = (states_NH - means_GH[group_N]) @ directions[known].T
    return float((np.square(within_ND).mean(0) / np.square(lengths[known])).sum())


def nc1(states_NH: np.ndarray, group_N: np.ndarray) -> float:
    """`scatter_ratio` over the number of groups: the first measure of neural collapse."""
    return scatter_ratio(states_NH, group_N) / len(np.unique(group_N[group_N >= 0]))


def effective_rank(states_NH: np.ndarray) -> float:
    """Exponential of the entropy of the singular values' shares, of centred states (Roy and Vetterli 2007)."""
    values = np.linalg.svd(states_NH - states_NH.mean(0), compute_uv=False)
    shares = values[values > 0] / values.sum() if values.sum() else np.ones(1)
    return float(np.exp(-(shares * np.log(shares)).sum()))


def span_share(states_NH: np.ndarray, embeddings_EH: np.ndarray) -> float:
    """Share of the centred states' square length that lies in the span of the expert embeddings."""
    _, lengths, directions = np.linalg.svd(embeddings_EH, full_matrices=False)
    basis_DH = directions[lengths > lengths.max() * 1e-6]
    centred = states_NH - states_NH.mean(0)
    return float(np.square(centred @ basis_DH.T).sum() / np.square(centred).sum())


def measure_collapse(states: LayerStates, seed: int = 0) -> dict[str, Measured]:
    """All of these for one layer, intervals over documents.

    Baselines: permuted experts for scatter and NC1; for ranks and the span normal states of the same shape, with
    embeddings as they are. A resample repeats documents, so that with few tokens for the width its ranks are lower.
    """
    generator = np.random.default_rng(seed)
    samples = int(states.document_N.max(initial=-1)) + 1
    parts = [np.flatnonzero(states.document_N == number) for number in range(samples)]
    draws = [
        np.concatenate([parts[number] for number in generator.integers(0, samples, samples)]) for _ in range(_DRAWS)
    ] if samples > 1 else []  # fmt: skip

    def put(figure: Callable[[np.ndarray], float], nulls: list[float], baseline: str) -> Measured:
        return summed_up(figure(np.arange(len(states.expert_N))), map(figure, draws), nulls, baseline)

    found = {}
    for name, measure in (("scatter within over between experts", scatter_ratio), ("NC1 of experts", nc1)):
        mixed = [measure(states.routed_NH, generator.permutation(states.expert_N)) for _ in range(_DRAWS)]
        found[name] = put(
            lambda rows, measure=measure: measure(states.routed_NH[rows], states.expert_N[rows]), mixed,
            "permuted experts",
        )  # fmt: skip
    normal = [generator.standard_normal(states.before_NH.shape) for _ in range(3)]
    ranks = [effective_rank(each) for each in normal]
    spans = [span_share(each, states.embeddings_EH) for each in normal]
    for name, array in (("before", states.before_NH), ("behind", states.behind_NH)):
        found[f"effective rank {name} the layer"] = put(
            lambda rows, array=array: effective_rank(array[rows]), ranks, "normal states"
        )
    found["share in the span of expert embeddings"] = put(
        lambda rows: span_share(states.routed_NH[rows], states.embeddings_EH), spans, "normal states"
    )
    return found
