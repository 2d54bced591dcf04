"""Collapsed states give a small scatter ratio and a low rank, states without structure what chance gives."""

import numpy as np
import pytest
import torch

from megatron_anyexperts.analysis.routing.collapse import (
    effective_rank,
    measure_collapse,
    nc1,
    scatter_ratio,
    span_share,
)
from megatron_anyexperts.evaluation.held_out import forward
from megatron_anyexperts.evaluation.hidden_states import LayerStates, hidden_states
from megatron_anyexperts.moe.metrics import record_tokens
from tests.unit.models.small import DYNAMIC
from tests.unit.training.test_trace import microbatch

GENERATOR = np.random.default_rng(0)
GROUP = np.arange(400) % 4


def around_experts(noise: float) -> tuple[np.ndarray, np.ndarray]:
    """States [N, H] around the embedding of each token's expert, and the embeddings [E, H]."""
    embeddings = GENERATOR.standard_normal((4, 16))
    return embeddings[GROUP] + noise * GENERATOR.standard_normal((400, 16)), embeddings


def test_the_ratio_is_the_trace_of_its_definition():
    states, _ = around_experts(0.5)
    mean, within, between = states.mean(0), np.zeros((16, 16)), np.zeros((16, 16))
    for group in range(4):
        own = states[group == GROUP]
        within += (own - own.mean(0)).T @ (own - own.mean(0)) / len(states)
        between += len(own) / len(states) * np.outer(own.mean(0) - mean, own.mean(0) - mean)
    assert scatter_ratio(states, GROUP) == pytest.approx(np.trace(within @ np.linalg.pinv(between, rcond=1e-9)))
    assert nc1(states, GROUP) == pytest.approx(scatter_ratio(states, GROUP) / 4)
    left_out = np.concatenate((GROUP, np.full(50, -1)))
    assert scatter_ratio(np.concatenate((states, np.ones((50, 16)))), left_out) == scatter_ratio(states, GROUP)
    assert np.isnan(scatter_ratio(states, np.zeros(400, int)))
    far = (states + 1000).astype(np.float32)  # as models hand them over, with a large mean
    assert scatter_ratio(far, GROUP) == pytest.approx(scatter_ratio(states, GROUP), rel=1e-3)


def test_ranks_and_spans_of_known_states():
    axes = np.concatenate((np.eye(5), -np.eye(5)))
    assert effective_rank(axes) == pytest.approx(5)
    assert effective_rank(axes * [1, 0, 0, 0, 0]) == pytest.approx(1)
    embeddings = np.eye(5)[:2]
    assert span_share(axes, embeddings) == pytest.approx(0.4)
    assert span_share(axes * [3, 3, 0, 0, 0], embeddings) == pytest.approx(1)


def states_of(states: np.ndarray, embeddings: np.ndarray) -> LayerStates:
    return LayerStates(states, states, states, GROUP, np.arange(400) // 10, embeddings)


def test_collapsed_states_stand_out_and_random_ones_do_not():
    collapsed = measure_collapse(states_of(*around_experts(0.05)))
    random = measure_collapse(states_of(GENERATOR.standard_normal((400, 16)), GENERATOR.standard_normal((4, 16))))
    for name in ("scatter within over between experts", "NC1 of experts"):
        assert collapsed[name].value < collapsed[name].null / 100 and collapsed[name].stands_out
        assert random[name].null / 3 < random[name].value < 3 * random[name].null
    rank = "effective rank behind the layer"
    assert collapsed[rank].value < 8 and collapsed[rank].null > 14
    assert random[rank].value == pytest.approx(random[rank].null, rel=0.05)
    span = "share in the span of expert embeddings"
    assert collapsed[span].value > 0.95 and random[span].value == pytest.approx(4 / 16, abs=0.05)


def test_states_are_read_around_every_mixture_layer(make_model):
    model = make_model({"hybrid_layer_pattern": "*E*E"}, **DYNAMIC).eval()
    batch = microbatch()
    found = hidden_states(model, [batch, batch], most_tokens=15)
    assert list(found) == [2, 4]
    with record_tokens() as layers, torch.no_grad():
        hidden = []
        handle = model.language_model.decoder.layers[3].mlp.register_forward_pre_hook(
            lambda _, words, named: hidden.append(words[0] if words else named["hidden_states"]), with_kwargs=True
        )
        forward(model, batch)
        handle.remove()
    states = found[4]
    assert states.routed_NH[:10] == pytest.approx(hidden[0][:10, 0].numpy()) and len(states.routed_NH) == 15
    assert states.routed_NH[10:] == pytest.approx(states.routed_NH[:5])  # no padding between
    assert not np.allclose(states.before_NH, states.behind_NH)
    assert states.document_N.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert ((states.expert_N[:10] >= 0) == (layers[4][0].real_SB[:10, 0].numpy() > 0)).all()
    assert states.embeddings_EH.shape == (4, 32)
