"""Routing of known structure: arrays for the formulas, and traces on disk for the command."""

from pathlib import Path

import numpy as np

from megatron_anyexperts import trace_file
from megatron_anyexperts.analysis.routing.chance import random_routing

SAMPLES, TOKENS, EXPERTS, TASKS = 40, 25, 8, 4
SAMPLE = np.repeat(np.arange(SAMPLES), TOKENS)  # [N]
TASK = np.arange(SAMPLES) % TASKS  # [P]


def specialists() -> np.ndarray:
    """bool [1, N, E]: each task has two experts of its own, which all of its tokens use."""
    active = np.zeros((1, SAMPLES * TOKENS, EXPERTS), bool)
    for turn in (0, 1):
        active[0, np.arange(SAMPLES * TOKENS), 2 * TASK[SAMPLE] + turn] = True
    return active


def without_preference(seed: int = 0) -> np.ndarray:
    """bool [1, N, E]: two experts at random for each token."""
    two = np.full(SAMPLES * TOKENS, 2)
    return random_routing(two, EXPERTS, np.random.default_rng(seed))[None]


def collapsed() -> np.ndarray:
    """bool [1, N, E]: the first two experts for each token."""
    active = np.zeros((1, SAMPLES * TOKENS, EXPERTS), bool)
    active[..., :2] = True
    return active


def write_trace(folder: Path, active_LNE: np.ndarray, step: int = 10, **changed: np.ndarray) -> Path:
    """A trace of one rank, as `training.trace` writes it."""
    layers, tokens, experts = active_LNE.shape
    keys = {
        "step": np.full(tokens, step),
        "data_rank": np.zeros(tokens, int),
        "sequence": SAMPLE,
        "position": np.arange(tokens) % TOKENS,
    }
    names = {
        "sample": np.array([f"t{task}/s{sample}" for sample, task in zip(SAMPLE, TASK[SAMPLE], strict=True)], object),
        "task": np.array([f"t{task}" for task in TASK[SAMPLE]], object),
        "offset": keys["position"],
        "modality": np.array(["text", "image"], object)[keys["position"] % 2],
        "token": np.arange(tokens) % 7,
    }
    trace_file.write(trace_file.path_of(folder, "tokens", step, 0), "tokens", keys | names | changed)
    for layer in range(layers):  # a file for each, as pipeline stages write them
        active = active_LNE[layer]
        real = active.sum(1)
        routing = {
            "layer": np.full(tokens, layer + 2),
            "slots": real + 1,
            "real": real,
            "importance": np.full(tokens, 0.5),
            "virtual_gate": np.zeros(tokens),
            "experts": np.nonzero(active)[1],
            "gates": np.full(real.sum(), 0.5),
        }
        trace_file.write(trace_file.path_of(folder, "routing", step, layer), "routing", keys | routing)
    return folder
