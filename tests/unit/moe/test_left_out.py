"""Padding and tokens that are NaN or Inf get no slots, count nowhere, and change nothing for the others."""

import pytest
import torch

from tests.unit.moe.builders import HIDDEN, config, layer, static
from tests.unit.moe.test_layer import dynamic_layer
from tests.unit.moe.test_router import SCORES

BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
TARGETS = {"anyexperts_target_slots": 3.0, "anyexperts_target_real": 2.6}
LAYERS = {
    "dynamic": lambda: dynamic_layer(**BIAS, **TARGETS, anyexperts_virtual_kind="constant"),
    "budget": lambda: dynamic_layer(**TARGETS, anyexperts_budget_slack=1.0, moe_shared_expert_intermediate_size=8),
    "static": lambda: layer(static(**BIAS)),
} | {f"dynamic {number}": lambda score=score: dynamic_layer(**score) for number, score in enumerate(SCORES)}


def state(built) -> list[torch.Tensor]:
    """What the step's controllers and the expert bias will read."""
    counts = built.router.local_tokens_per_expert
    return [built.router.control.counts] + ([] if counts is None else [counts])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", LAYERS)
def test_padding_changes_no_other_token_and_no_count(one_rank, kind, mode):
    built, alone = LAYERS[kind](), LAYERS[kind]()
    alone.load_state_dict(built.state_dict())
    hidden = torch.randn(12, 2, HIDDEN)
    padded = torch.cat((hidden, 5 * torch.randn(6, 2, HIDDEN)))
    mask = (torch.arange(18) >= 12).expand(2, -1)
    outputs = [getattr(x, mode)()(y, padding_mask=m)[0] for x, y, m in ((built, padded, mask), (alone, hidden, None))]
    torch.testing.assert_close(outputs[0][:12], outputs[1], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(state(built), state(alone), strict=True))
    decision = built.router(padded, mask.t())
    assert not decision.routing_map_TE.view(18, 2, -1)[12:].any() and not decision.slots_T.view(18, 2)[12:].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_token_that_is_not_finite_is_nan_and_harms_no_other(one_rank, kind, value):
    built, alone = LAYERS[kind](), LAYERS[kind]()
    alone.load_state_dict(built.state_dict())
    hidden = torch.randn(12, 1, HIDDEN)
    broken = hidden.clone()
    broken[[2, 7], 0, 3] = value
    healthy = torch.ones(12, dtype=torch.bool).index_fill(0, torch.tensor([2, 7]), False)
    output = built(broken)[0]
    torch.testing.assert_close(output[healthy], alone(hidden[healthy])[0], rtol=1e-4, atol=1e-5)
    assert output[~healthy].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(state(built), state(alone), strict=True))


def test_padding_and_broken_tokens_have_no_share_in_the_gradient_of_the_losses(one_rank):
    losses = {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [1.0, 1.0, 1.0],
        "moe_z_loss_coeff": 1.0,
        "anyexperts_spread_loss_coeff": 1.0,
        "anyexperts_spread_target": 0.5,
        "anyexperts_budget_loss_coeff": 1.0,
    }
    hidden = torch.randn(12, 2, HIDDEN)
    padded = torch.cat((hidden, torch.randn(5, 2, HIDDEN)))
    mask = (torch.arange(17) >= 12).expand(2, -1)
    gradients = []
    for x, m in ((hidden, None), (padded, mask)):
        torch.manual_seed(3)
        built = layer(config(anyexperts_k_min=2, anyexperts_k_max=6, anyexperts_rho_max=0.35, **TARGETS, **losses))
        (built(x, padding_mask=m)[0].sum() * 0).backward()
        gradients.append([p.grad for name, p in built.named_parameters() if ".experts." not in f".{name}"])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
