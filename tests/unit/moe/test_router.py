"""Dynamic slots: bounds, gradient, causality, losses, counters."""

import pytest
import torch

from megatron_anyexperts.moe.router import AnyExpertsRouter
from megatron_anyexperts.moe.scores import Scores
from megatron_anyexperts.moe.slots import virtual_cap
from tests.unit.moe.builders import EXPERTS, HIDDEN, config, groups, layer

DYNAMIC = {"anyexperts_k_min": 2, "anyexperts_k_max": 6, "anyexperts_rho_max": 0.35}
SCORES = [
    {"moe_router_score_function": "softmax"},
    {"moe_router_score_function": "softmax", "moe_router_pre_softmax": True},
    {"moe_router_score_function": "sigmoid"},
    {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    {"moe_router_score_function": "sqrtsoftplus"},
    {
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 3,
        "moe_router_topk": 6,
        "moe_router_topk_scaling_factor": 2.5,
    },
]


def router(**options) -> AnyExpertsRouter:
    built = AnyExpertsRouter(config(**(DYNAMIC | options)), groups())
    built.weight.data.normal_()
    if built.virtual_weight is not None:
        built.virtual_weight.data.normal_()
    built.set_layer_number(1)
    return built


def batch(tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, and importance that also reaches both ends of the slot range."""
    return torch.randn(tokens, 2, HIDDEN), (1.4 * torch.rand(2 * tokens) - 0.2).clamp(0, 1)


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("gradient", ["fractional", "straight_through", "none"])
def test_slots_are_filled_within_range_and_virtual_cap(one_rank, score, gradient):
    built = router(anyexperts_slot_gradient=gradient, **score)
    built.control.virtual_bias.fill_(0.5)
    hidden, importance = batch()
    decision = built(hidden, None, importance)
    real = decision.routing_map_TE.sum(1)
    virtual = decision.slots_T - real
    assert decision.slots_T.min() == 2 and decision.slots_T.max() == 6
    assert (virtual >= 0).all() and virtual.sum() > 0
    for slots, count in zip(decision.slots_T.tolist(), virtual.tolist(), strict=True):
        assert count <= virtual_cap(slots, 0.35)
    assert ((decision.gates_TE > 0) == decision.routing_map_TE).all()
    assert ((decision.virtual_gate_T > 0) == (virtual > 0)).all()
    total = decision.gates_TE.sum(1) + decision.virtual_gate_T
    if not built.config.moe_router_pre_softmax:
        torch.testing.assert_close(total, torch.full_like(total, score.get("moe_router_topk_scaling_factor", 1.0)))


@pytest.mark.parametrize("score", SCORES[:5], ids=str)
def test_gates_are_continuous_in_importance(one_rank, score):
    """Also where a slot appears and where the virtual cap steps: the range holds both."""
    built = router(**score)
    built.eval()
    built.control.virtual_bias.fill_(0.3)
    hidden = torch.randn(1, 1, HIDDEN).expand(4001, 1, HIDDEN)
    decision = built(hidden, None, torch.linspace(0, 1, 4001))
    assert len(decision.slots_T.unique()) == 5
    gates = torch.cat((decision.gates_TE, decision.virtual_gate_T.unsqueeze(1)), dim=1)
    assert (gates[1:] - gates[:-1]).abs().max() < 5e-3
    assert (gates[-1] - gates[0]).abs().max() > 5e-2


@pytest.mark.parametrize("gradient", ["fractional", "straight_through", "none"])
def test_importance_gets_a_gradient_exactly_when_asked(one_rank, gradient):
    built = router(anyexperts_slot_gradient=gradient)
    hidden, importance = batch()
    importance = (0.1 + 0.8 * importance).requires_grad_()
    decision = built(hidden, None, importance)
    (decision.gates_TE * torch.randn(EXPERTS)).sum().backward()
    if gradient == "none":
        assert importance.grad is None
    else:
        assert (importance.grad != 0).float().mean() > 0.9


@pytest.mark.parametrize("gradient", ["fractional", "straight_through"])
def test_a_centred_gradient_is_that_of_each_token_less_the_mean_of_those_that_take_part(one_rank, gradient):
    plain = router(anyexperts_slot_gradient=gradient)
    centred = router(anyexperts_slot_gradient=gradient, anyexperts_importance_gradient="centred")
    centred.load_state_dict(plain.state_dict())
    hidden, importance = batch()
    padding = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    padding[30:, 0] = True
    factors = torch.randn(EXPERTS)
    gradients, gates = [], []
    for built in (plain, centred):
        given = importance.clone().requires_grad_()
        decision = built(hidden, padding, given)
        (decision.gates_TE * factors).sum().backward()
        gradients.append(given.grad)
        gates.append(decision.gates_TE)
    assert torch.equal(*gates)
    taking_part = ~padding.flatten()
    assert gradients[0][taking_part].mean().abs() > 1e-4
    expected = (gradients[0] - gradients[0][taking_part].mean()) * taking_part
    torch.testing.assert_close(gradients[1], expected)


def test_centring_leaves_the_budget_loss_its_gradient(one_rank):
    options = {"anyexperts_target_slots": 3.0, "anyexperts_budget_loss_coeff": 1.0}
    gradients = []
    for how in ("plain", "centred"):
        torch.manual_seed(3)
        built = router(anyexperts_importance_gradient=how, **options)
        given = torch.full((80,), 0.9, requires_grad=True)
        (built(torch.randn(40, 2, HIDDEN), None, given).gates_TE * 0).sum().backward()
        gradients.append(given.grad)
    assert (gradients[0] > 0).all()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("score", SCORES[:5], ids=str)
def test_gradients_of_gates_match_finite_differences(one_rank, score):
    built = router(moe_router_dtype="fp64", **score)
    importance = torch.rand(3, dtype=torch.float64) * 0.8 + 0.1
    mix = torch.randn(EXPERTS + 1, dtype=torch.float64)

    def output(logits, w):
        decision = built.decide(logits, None, w)
        return decision.gates_TE @ mix[:-1] + decision.virtual_gate_T * mix[-1]

    logits = torch.randn(3, 1, EXPERTS + 2, dtype=torch.float64)
    # Scores are fp32 whatever the router dtype, as upstream: hence the wide step.
    leaves = logits.requires_grad_(), importance.requires_grad_()
    assert torch.autograd.gradcheck(output, leaves, eps=1e-3, atol=2e-3, rtol=2e-2)


def test_slots_do_not_depend_on_other_tokens(one_rank):
    built = layer(config(**DYNAMIC))
    built.importance.down.data.normal_()
    built.eval()
    hidden = torch.randn(12, 2, HIDDEN)
    changed = hidden.clone()
    changed[7:] = torch.randn(5, 2, HIDDEN)
    first, second = built(hidden)[0], built(changed)[0]
    assert torch.equal(first[:7], second[:7])
    assert not torch.equal(first[7:], second[7:])
    w, v = built.importance(hidden)[0], built.importance(changed)[0]
    slots, others = built.router(hidden, None, w).slots_T, built.router(changed, None, v).slots_T
    assert len(slots.unique()) > 1
    assert torch.equal(slots[:14], others[:14])


def test_trim_acts_in_training_only(one_rank):
    built = router(anyexperts_target_slots=3.0, anyexperts_budget_slack=1.0)
    hidden, importance = batch()
    assert built(hidden, None, importance).slots_T.sum() == 240
    built.eval()
    assert built(hidden, None, importance).slots_T.sum() > 240


def test_padding_and_evaluation_never_count(one_rank):
    built = router(anyexperts_target_slots=4.0, moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")
    hidden, importance = batch()
    padding = torch.zeros(40, 2, dtype=torch.bool)
    padding[30:] = True
    decision = built(hidden, padding, importance)
    slots, routed = decision.slots_T[:60], decision.routing_map_TE[:60]
    assert built.control.counts[:3].tolist() == [60, slots.sum(), routed.sum()]
    assert built.local_tokens_per_expert.tolist() == routed.sum(0).tolist()
    built.eval()
    built(hidden, padding, importance)
    built.train()
    with torch.no_grad():
        built(hidden, padding, importance)
    assert built.control.counts[0] == 60
    assert built.local_tokens_per_expert.sum() == routed.sum()


def test_accumulated_microbatches_count_like_one(one_rank):
    hidden, importance = batch()
    whole, parts = router(anyexperts_target_slots=4.0), router(anyexperts_target_slots=4.0)
    parts.load_state_dict(whole.state_dict())
    whole(hidden, None, importance)
    parts(hidden[:10], None, importance[:20])
    parts(hidden[10:], None, importance[20:])
    assert torch.equal(whole.control.counts, parts.control.counts)


@pytest.mark.parametrize("granularity", ["none", "router", "moe"])
def test_recomputation_counts_once(one_rank, granularity):
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe"]} if granularity == "moe" else {}
    built = layer(config(**DYNAMIC, anyexperts_target_slots=4.0, **recompute))
    hidden = torch.randn(10, 2, HIDDEN, requires_grad=True)
    if granularity == "router":
        output = torch.utils.checkpoint.checkpoint(lambda x: built(x)[0], hidden, use_reentrant=True)
    else:
        output = built(hidden)[0]
    output.sum().backward()
    assert built.router.control.counts[0] == 20


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_padding_does_not_move_balance_losses(one_rank, kind):
    """The gradient of the real tokens is that of the same batch without padding."""
    losses = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 1.0}
    hidden, importance = batch(12)
    padded = torch.cat((hidden, torch.randn(5, 2, HIDDEN)))
    padding = torch.zeros(17, 2, dtype=torch.bool)
    padding[12:] = True
    gradients = []
    for x, w, mask in ((hidden, importance, None), (padded, torch.cat((importance, torch.rand(10))), padding)):
        torch.manual_seed(3)
        built = router(**losses)
        decision = built(x, mask, w)
        (decision.gates_TE * 0).sum().backward()
        gradients.append(built.weight.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_budget_and_spread_losses_reach_importance(one_rank):
    built = router(anyexperts_target_slots=3.0, anyexperts_budget_loss_coeff=1.0, anyexperts_slot_gradient="none")
    importance = torch.full((20,), 0.8, requires_grad=True)
    (built(torch.randn(10, 2, HIDDEN), None, importance).gates_TE * 0).sum().backward()
    assert (importance.grad > 0).all()

    built = router(anyexperts_spread_loss_coeff=1.0, anyexperts_slot_gradient="none")
    importance = torch.linspace(0.49, 0.51, 20).requires_grad_()
    (built(torch.randn(10, 2, HIDDEN), None, importance).gates_TE * 0).sum().backward()
    assert importance.grad[0] > 0 > importance.grad[-1]


def test_fallback_gates_cover_exactly_the_eligible_columns_without_a_slot(one_rank):
    for score in SCORES:
        built = router(anyexperts_dispatch_eps=0.1, **score)
        hidden, importance = batch()
        decision = built(hidden, None, importance)
        assert not (decision.fallback_gates_TE[decision.routing_map_TE] != 0).any()
        free = decision.fallback_gates_TE > 0
        assert torch.equal(free, decision.eligible_TE & ~decision.routing_map_TE)
        if "moe_router_num_groups" in score:
            assert ((free | decision.routing_map_TE).sum(1) == 6).all()
        else:
            assert (free ^ decision.routing_map_TE).all()


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_a_logit_of_minus_infinity_leaves_an_expert_eligible_when_its_group_is(score):
    settings = config(anyexperts_dispatch_eps=0.1, **score)
    logits = torch.randn(20, settings.num_moe_experts)
    logits[:, 0] = -torch.inf
    scores = Scores.of(logits, settings)
    routed = torch.zeros_like(logits, dtype=torch.bool).scatter(1, scores.best_real(2, None).columns, True)
    gates, eligible = scores.fallback(routed * 0.5, routed, None)
    assert (gates[:, 0] == 0).all() and gates.isfinite().all()
    if "moe_router_num_groups" in score:
        assert (eligible.sum(1) == 6).all()
    else:
        assert eligible.all()


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_static_and_dynamic_path_agree_on_fallback_gates(one_rank, score):
    built = AnyExpertsRouter(config(anyexperts_alpha=0.0, anyexperts_dispatch_eps=0.1, **score), groups())
    built.weight.data.normal_()
    hidden = torch.randn(20, 2, HIDDEN)
    static = built(hidden)
    general = built.decide(built.gating(hidden), None, torch.full((40,), 0.5))
    torch.testing.assert_close(static.fallback_gates_TE, general.fallback_gates_TE)


@pytest.mark.parametrize(
    "forced",
    [{"moe_router_force_load_balancing": True}, {"moe_router_force_biased": 0.5}],
    ids=lambda value: next(iter(value)),
)
def test_forced_routing_keeps_the_slots_and_moves_the_experts(one_rank, forced):
    built = router(**forced)
    hidden, importance = torch.randn(1, 1, HIDDEN).expand(500, 2, HIDDEN), torch.rand(1000)
    decision = built(hidden, None, importance)
    real = decision.routing_map_TE.sum(0).float()
    assert (decision.slots_T >= 2).all() and decision.slots_T.float().mean() > 4
    assert real.min() > 0
    if "moe_router_force_load_balancing" in forced:
        assert real.max() / real.mean() < 1.15


def test_jitter_moves_logits_in_training_only(one_rank):
    built = router(moe_input_jitter_eps=0.2)
    hidden, importance = batch()
    first, second = built(hidden, None, importance), built(hidden, None, importance)
    assert torch.equal(first.slots_T, second.slots_T)
    assert not torch.equal(first.gates_TE, second.gates_TE)
    built.eval()
    generator = torch.get_rng_state()
    assert torch.equal(built(hidden, None, importance).gates_TE, built(hidden, None, importance).gates_TE)
    assert torch.equal(torch.get_rng_state(), generator)


def test_virtual_bias_moves_the_choice_and_not_the_gates(one_rank):
    built = router(moe_router_score_function="sigmoid", moe_router_pre_softmax=False)
    hidden, importance = batch()
    shares = []
    for bias in (-12.0, 0.0, 12.0):
        built.control.virtual_bias.fill_(bias)
        decision = built(hidden, None, importance)
        shares.append((decision.slots_T - decision.routing_map_TE.sum(1)).float().mean().item())
        assert decision.virtual_gate_T.max() < 1
    assert shares[0] == 0 < shares[1] < shares[2]
    caps = torch.tensor([virtual_cap(slots, 0.35) for slots in decision.slots_T.tolist()])
    # A saturated sigmoid ties at 1, and on a tie the real column wins.
    assert shares[2] == pytest.approx(caps.float().mean().item(), rel=0.05)
