"""How evenly experts are loaded: max violation, entropy, dead experts; beside balanced routing of as many slots."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_anyexperts.analysis.routing.chance import random_routing
from megatron_anyexperts.analysis.routing.intervals import NULL_DRAWS, Measured, measured
from megatron_anyexperts.analysis.routing.specialisation import group_counts
from megatron_anyexperts.analysis.routing.table import RoutingTable


def max_violation(load_E: np.ndarray) -> float:
    """max_e(T_e / mean) - 1; 0 when all experts get the same."""
    return float(load_E.max() / load_E.mean() - 1) if load_E.sum() else float("nan")


def entropy(load_E: np.ndarray) -> float:
    """Entropy of the loads over that of even ones: 1 when all get the same, 0 when one gets all."""
    shares = load_E[load_E > 0] / load_E.sum() if load_E.sum() else np.full(1, np.nan)
    return float(-(shares * np.log(shares)).sum() / np.log(len(load_E))) if len(load_E) > 1 else float("nan")


def dead(load_E: np.ndarray) -> float:
    """Experts that got nothing."""
    return float((load_E == 0).sum())


FIGURES = {"max violation": max_violation, "load entropy": entropy, "dead experts": dead}


def measure_balance(
    active_NE: np.ndarray, sample_N: np.ndarray, samples: int, seed: int = 0
) -> dict[str, Measured]:
    """The three figures of one layer."""
    counts_PE, _ = group_counts(active_NE, sample_N, samples)
    real_N, generator = active_NE.sum(1), np.random.default_rng(seed)
    loads = [random_routing(real_N, active_NE.shape[1], generator).sum(0) for _ in range(NULL_DRAWS)]

    def one(figure: Callable[[np.ndarray], float]) -> Measured:
        nulls = [figure(load_E) for load_E in loads]
        return measured(lambda drawn: figure(counts_PE[drawn].sum(0)), samples, nulls, "balanced random routing", seed)

    return {name: one(figure) for name, figure in FIGURES.items()}


def load_over_time(table: RoutingTable) -> dict[str, tuple[np.ndarray, list[str], list[str]]]:
    """For each layer the load of each expert over the mean, by step; nothing of a single step."""
    steps, step_N = np.unique(table.step_N, return_inverse=True)
    if len(steps) < 2:
        return {}
    found = {}
    for place, number in enumerate(table.layers):
        counts_GE, _ = group_counts(table.active_LNE[place], step_N, len(steps))
        loads = counts_GE / np.maximum(counts_GE.mean(1, keepdims=True), 1e-9)
        names = [f"step {step}" for step in steps], [str(expert) for expert in range(table.experts)]
        found[f"load over time, layer {number}"] = (loads, *names)
    return found
