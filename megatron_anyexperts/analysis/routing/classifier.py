"""Whether the task of a prompt can be told from its routing signature: logistic regression by cross-validation.

After arXiv 2603.11114, which finds 92.5 +- 6.1 % for four categories.
"""

from __future__ import annotations

import warnings

import numpy as np

from megatron_anyexperts.analysis.routing.chance import random_routing
from megatron_anyexperts.analysis.routing.intervals import Measured, summed_up
from megatron_anyexperts.analysis.routing.signatures import signatures


class TooFewSamples(ValueError):
    """Some task has fewer samples than there are folds, or there is one task only."""


def fold_accuracies(features_PF: np.ndarray, tasks_P: np.ndarray, folds: int = 5, seed: int = 0) -> np.ndarray:
    """Accuracy on each held-out fold; folds have each task in equal shares.

    Args:
        features_PF: a row for each sample.
        tasks_P: its task.
        folds: parts of the samples, each held out once.
        seed: of their order.

    Raises:
        TooFewSamples: no such folds can be made.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names, counts = np.unique(tasks_P, return_counts=True)
    if len(names) < 2 or counts.min() < folds:
        raise TooFewSamples(f"{folds} folds need two tasks of {folds} samples each; there are {counts.tolist()}")
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that has not converged classifies as it stands
        return cross_val_score(model, features_PF, tasks_P, cv=splits)


def measure_classifier(
    active_LNE: np.ndarray, sample_N: np.ndarray, tasks_P: np.ndarray, layers: tuple[int, ...], seed: int = 0
) -> dict[str, Measured]:
    """Accuracy from all layers, and from each alone, beside what permuted tasks and random routing give.

    The interval is that of the folds' mean over repeated splits.

    Raises:
        TooFewSamples: see `fold_accuracies`.
    """
    generator = np.random.default_rng(seed)
    count = len(tasks_P)
    signatures_PLE = signatures(active_LNE, sample_N, count)
    drawn = np.stack([random_routing(a.sum(1), a.shape[1], generator) for a in active_LNE])
    random_PLE = signatures(drawn, sample_N, count)

    def mean(features: np.ndarray, tasks: np.ndarray, split: int = seed) -> float:
        return float(fold_accuracies(features.reshape(count, -1), tasks, seed=split).mean())

    def one(features: np.ndarray) -> Measured:
        repeats = [mean(features, tasks_P, seed + turn) for turn in range(5)]
        nulls = [mean(features, generator.permutation(tasks_P)) for _ in range(10)]
        return summed_up(repeats[0], repeats, nulls, "permuted tasks")

    found = {"all layers": one(signatures_PLE)}
    found["all layers, balanced random routing"] = one(random_PLE)
    return found | {f"layer {number}": one(signatures_PLE[:, place]) for place, number in enumerate(layers)}
