"""With k_min = k_max = top-k, no virtual experts and alpha 0 everything is Megatron's, bit for bit."""

import itertools

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from tests.unit.moe.builders import EXPERTS, HIDDEN, layer, routers, static

SCORES = [
    {"moe_router_score_function": "softmax"},
    {"moe_router_score_function": "softmax", "moe_router_pre_softmax": True},
    {"moe_router_score_function": "sigmoid"},
    {"moe_router_score_function": "sqrtsoftplus"},
    {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
]
SHAPES = [{}, {"moe_router_num_groups": 4, "moe_router_group_topk": 2}, {"moe_router_topk_scaling_factor": 2.5}]
LOSSES = [
    {},
    {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1},
    {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1},
    {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1},
    {"moe_z_loss_coeff": 0.01, "moe_input_jitter_eps": 0.1},
]
LOSSES += [loss | {"calculate_per_token_loss": True} for loss in LOSSES[1:4]]
CASES = [a | b for a, b in itertools.product(SCORES, SHAPES)] + [
    a | b for a, b in itertools.product(SCORES, LOSSES[1:])
]


def name(case: dict) -> str:
    return "-".join(str(value) for value in case.values())


def run(router, hidden, gates_and_map):
    hidden = hidden.clone().requires_grad_()
    torch.manual_seed(5)
    gates, routed = gates_and_map(router, hidden)
    (gates * torch.linspace(-1, 1, gates.numel()).view_as(gates)).sum().backward()
    return gates, routed, hidden.grad, router.weight.grad


def forward_stock(router, hidden):
    return router(hidden)


def forward_ours(router, hidden):
    decision = router(hidden)
    return decision.gates_TE, decision.routing_map_TE


def forward_general(router, hidden):
    logits = router.gating(router.apply_input_jitter(hidden))
    decision = router.decide(logits, None, torch.full((logits.shape[:2].numel(),), 0.3))
    return decision.gates_TE, decision.routing_map_TE


def assert_identical(stock, ours):
    for theirs, mine in zip(stock, ours, strict=True):
        assert theirs.dtype == mine.dtype and torch.equal(theirs, mine)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_static_routing_is_bit_identical_to_top_k(one_rank, case):
    stock, ours = routers(static(**case))
    hidden = torch.randn(6, 3, HIDDEN)
    assert_identical(run(stock, hidden, forward_stock), run(ours, hidden, forward_ours))
    if stock.expert_bias is not None:
        assert torch.equal(stock.local_tokens_per_expert, ours.local_tokens_per_expert)


@pytest.mark.parametrize("case", [a | b for a, b in itertools.product(SCORES, SHAPES)], ids=name)
def test_the_dynamic_path_itself_reduces_to_top_k(one_rank, case):
    stock, ours = routers(static(**case))
    hidden = torch.randn(6, 3, HIDDEN)
    assert_identical(run(stock, hidden, forward_stock), run(ours, hidden, forward_general))


@pytest.mark.parametrize("case", LOSSES[1:4], ids=name)
def test_losses_of_actual_loads_reduce_to_megatrons(one_rank, case):
    stock, ours = routers(static(moe_router_score_function="sigmoid", **case))
    hidden = torch.randn(6, 3, HIDDEN)
    for theirs, mine in zip(run(stock, hidden, forward_stock), run(ours, hidden, forward_general), strict=True):
        torch.testing.assert_close(theirs.float(), mine.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_static_layer_gives_the_output_and_gradients_of_megatrons(one_rank, mode):
    cfg = static(
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1, moe_shared_expert_intermediate_size=16
    )
    stock, ours = layer(cfg, MoELayer), layer(cfg)
    ours.load_state_dict(stock.state_dict(), strict=False)
    hidden = torch.randn(6, 3, HIDDEN)
    results = []
    for built in (stock, ours):
        getattr(built, mode)()
        x = hidden.clone().requires_grad_()
        output, bias = built(x)
        assert bias is None
        output.square().sum().backward()
        results.append([output, x.grad, *(p.grad for _, p in sorted(built.named_parameters()))])
    for theirs, mine in zip(*results, strict=True):
        assert torch.equal(theirs, mine)


def test_expert_count_is_what_the_config_says(one_rank):
    _, ours = routers(static())
    assert ours.weight.shape == (EXPERTS, HIDDEN)
    assert ours.virtual_weight is None
