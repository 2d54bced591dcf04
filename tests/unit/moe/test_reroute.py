"""Claims about fitting one source's slots to its quota and room."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from megatron_anyexperts.moe.cap import fit_sources
from megatron_anyexperts.moe.decision import RoutingDecision
from megatron_anyexperts.moe.quotas import slot_cap
from megatron_anyexperts.moe.reroute import FittedSlots, fit_to_plan, with_gates


def _decision(logits, routed, importance, eligible=None):
    score = torch.sigmoid(logits)
    eligible = torch.ones_like(routed) if eligible is None else eligible
    return RoutingDecision(
        score * routed, routed, None, importance, routed.sum(1), score * (~routed & eligible), eligible
    )


def _fit(decision, quota, room, k_max) -> FittedSlots:
    return with_gates(decision, fit_to_plan(decision, quota, room, k_max), k_max)


@st.composite
def problems(draw):
    """A decision for T tokens (some empty, some restricted to few experts), and quotas and room for P ranks."""
    ranks, local = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    tokens, k_max = draw(st.integers(0, 24)), draw(st.integers(1, ranks * local))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(tokens, ranks * local, generator=generator)
    if draw(st.booleans()):
        logits = logits.round()  # many ties
    order = torch.rand(logits.shape, generator=generator).argsort(1)
    routed = order < torch.randint(0, k_max + 1, (tokens, 1), generator=generator)
    eligible = torch.rand(logits.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    demand = _per_rank(routed, ranks)
    quota = (demand * torch.rand(ranks, generator=generator)).round().long()
    room = torch.randint(0, draw(st.sampled_from([1, 3, 50])) + 1, (ranks,), generator=generator)
    room = room * (quota == demand)
    importance = torch.rand(tokens, generator=generator)
    return _decision(logits, routed, importance, eligible), quota, room, k_max


def _per_rank(map_TE, ranks):
    return map_TE.sum(0).view(ranks, -1).sum(1)


@given(problems())
def test_every_token_keeps_its_slots_and_every_rank_its_limit(problem):
    decision, quota, room, k_max = problem
    fitted = _fit(decision, quota, room, k_max)
    kept = fitted.routing_map_TE & decision.routing_map_TE
    rerouted = fitted.routing_map_TE & ~decision.routing_map_TE
    given_up = decision.routing_map_TE & ~kept
    assert (_per_rank(kept, len(quota)) == torch.minimum(quota, _per_rank(decision.routing_map_TE, len(quota)))).all()
    assert (_per_rank(rerouted, len(quota)) <= room).all()
    assert (rerouted.sum(1) <= given_up.sum(1)).all()
    assert fitted.rerouted == rerouted.sum()
    assert fitted.rerouted + fitted.displaced == given_up.sum()


@given(problems())
def test_gates_follow_the_slots_and_virtual_slots_keep_theirs(problem):
    decision, quota, room, k_max = problem
    fitted = _fit(decision, quota, room, k_max)
    kept = fitted.routing_map_TE & decision.routing_map_TE
    rerouted = fitted.routing_map_TE & ~decision.routing_map_TE
    assert torch.equal(fitted.gates_TE, decision.gates_TE * kept + decision.fallback_gates_TE * rerouted)
    assert decision.eligible_TE[rerouted].all()
    given_up = decision.gates_TE * (decision.routing_map_TE & ~kept)
    virtual_T = (decision.routing_map_TE & ~kept).sum(1) - rerouted.sum(1)
    smallest = torch.where(decision.routing_map_TE & ~kept, given_up, torch.inf).sort(1).values
    expected = smallest.where(torch.arange(smallest.shape[1]) < virtual_T[:, None], 0).sum(1)
    torch.testing.assert_close(fitted.displaced_gate_T, expected)


@given(problems())
def test_a_slot_becomes_virtual_only_if_no_eligible_expert_has_room(problem):
    decision, quota, room, k_max = problem
    fitted = _fit(decision, quota, room, k_max)
    rerouted = fitted.routing_map_TE & ~decision.routing_map_TE
    left = room - _per_rank(rerouted, len(quota))
    free = decision.eligible_TE & ~rerouted & ~decision.routing_map_TE
    open_TE = free & (left > 0).repeat_interleave(rerouted.shape[1] // len(quota))
    virtual_T = decision.routing_map_TE.sum(1) - fitted.routing_map_TE.sum(1)
    assert not ((virtual_T > 0) & open_TE.any(1)).any()


@given(problems())
def test_enough_quota_changes_nothing(problem):
    decision, quota, room, k_max = problem
    fitted = _fit(decision, _per_rank(decision.routing_map_TE, len(quota)), room, k_max)
    assert torch.equal(fitted.gates_TE, decision.gates_TE)
    assert torch.equal(fitted.routing_map_TE, decision.routing_map_TE)
    assert not fitted.displaced_gate_T.any() and not fitted.rerouted and not fitted.displaced


def test_the_more_important_token_keeps_its_expert_and_the_other_takes_its_next_best():
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0], [3.0, 0.0, 1.0, -1.0]])
    routed = torch.tensor([[True, False, False, False]] * 2)
    decision = _decision(logits, routed, importance=torch.tensor([0.9, 0.1]))
    fitted = _fit(decision, torch.tensor([1, 0]), torch.tensor([0, 1]), 1)
    assert fitted.routing_map_TE.tolist() == [[True, False, False, False], [False, False, True, False]]
    assert fitted.gates_TE[1, 2] == torch.sigmoid(torch.tensor(1.0))


def test_gradients_reach_kept_rerouted_and_virtual_gates():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    routed = logits.detach().argsort(1, descending=True).argsort(1) < 2
    mix = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    quota, room = torch.tensor([3, 4]), torch.tensor([0, 2])

    def output(logits):
        fitted = _fit(_decision(logits, routed, torch.full((6,), 0.5)), quota, room, 2)
        assert fitted.rerouted > 0 and fitted.displaced > 0
        return (fitted.gates_TE * mix).sum() + fitted.displaced_gate_T.square().sum()

    assert torch.autograd.gradcheck(output, logits)


def test_the_slot_that_loses_least_elsewhere_moves_and_not_the_smallest_gate():
    gates = torch.tensor([[0.9, 0.0, 0.85, 0.0], [0.7, 0.0, 0.1, 0.0]])
    routed = torch.tensor([[True, False, False, False]] * 2)
    decision = RoutingDecision(
        gates * routed, routed, None, torch.ones(2), routed.sum(1), gates * ~routed, torch.ones_like(routed)
    )
    fitted = _fit(decision, torch.tensor([1, 0]), torch.tensor([0, 1]), 1)
    assert fitted.routing_map_TE.tolist() == [[False, False, True, False], [True, False, False, False]]


def test_a_gate_of_zero_and_an_importance_of_zero_are_places_as_good_as_any_when_there_is_no_other():
    routed = torch.tensor([[True, False, False, False]] * 3)
    logits = torch.tensor([[1.0, 0.0, -torch.inf, -torch.inf]] * 3)
    decision = _decision(logits, routed, importance=torch.tensor([0.5, 0.0, 0.5]))
    fitted = _fit(decision, torch.tensor([1, 0]), torch.tensor([0, 2]), 1)
    assert (fitted.rerouted, fitted.displaced) == (2, 0)
    assert fitted.routing_map_TE[:, 2:].sum() == 2 and fitted.gates_TE[:, 2:].sum() == 0


def _all_sources(gates_STE, k, eps):
    """Decisions of sources with the top-k of these gates, the cap, and what all of them send."""
    decisions = []
    for gates_TE in gates_STE:
        routed = torch.zeros_like(gates_TE, dtype=torch.bool).scatter_(1, gates_TE.topk(k, dim=1).indices, True)
        decisions.append(
            RoutingDecision(
                gates_TE * routed,
                routed,
                None,
                torch.ones(len(gates_TE)),
                routed.sum(1),
                gates_TE * ~routed,
                torch.ones_like(routed),
            )
        )
    slots = sum(decision.routing_map_TE.sum() for decision in decisions)
    return decisions, slot_cap(slots, len(decisions), eps), fit_sources(decisions, len(decisions), k, eps).fitted


def test_identical_tokens_fill_every_rank_and_none_becomes_virtual():
    # 8 ranks of one expert, 16 identical tokens a source: 119 places for 111 slots.
    gates_STE = torch.linspace(1.0, 0.1, 8).expand(8, 16, 8)
    _, cap, fitted = _all_sources(gates_STE, k=1, eps=0.05)
    received = sum(fit.routing_map_TE.sum(0) for fit in fitted)
    assert received.max() <= cap and received.sum() == 128
    assert sum(fit.displaced for fit in fitted) == 0


@given(
    st.integers(2, 6), st.integers(1, 3), st.integers(0, 12), st.sampled_from([0.0, 0.05, 0.3]), st.integers(0, 2**32)
)
def test_room_that_one_source_cannot_use_goes_to_another(ranks, local, tokens, eps, seed):
    generator = torch.Generator().manual_seed(seed)
    k = min(ranks * local, 2)
    gates_STE = torch.rand(ranks, tokens, ranks * local, generator=generator)
    gates_STE[:, :, 0] += 2.0 * (seed % 2)
    gates_STE[0] = gates_STE[0] * 0.01 + torch.linspace(1, 0, ranks * local)
    decisions, cap, fitted = _all_sources(gates_STE, k, eps)
    received_P = _per_rank(torch.stack([fit.routing_map_TE for fit in fitted]).sum(0), ranks)
    assert (received_P <= cap).all()
    with_room_E = (received_P < cap).repeat_interleave(local)
    for decision, fit in zip(decisions, fitted, strict=True):
        missing_T = k - fit.routing_map_TE.sum(1)
        assert not ((missing_T > 0).unsqueeze(1) & with_room_E & ~fit.routing_map_TE & ~decision.routing_map_TE).any()


def _most_gate_mass(gates_NE: np.ndarray, k: int, cap: int, ranks: int) -> float:
    """Of all assignments of k experts a token and at most `cap` slots a rank: the linear program's value."""
    tokens, experts = gates_NE.shape
    entry = np.arange(tokens * experts)
    token, rank = entry // experts, entry % experts // (experts // ranks)
    rows = csr_matrix((np.ones(2 * len(entry)), (np.concatenate([token, tokens + rank]), np.tile(entry, 2))))
    limits = np.concatenate([np.full(tokens, k), np.full(ranks, cap)])
    return -linprog(-gates_NE.ravel(), A_ub=rows, b_ub=limits, bounds=(0, 1)).fun


@pytest.mark.parametrize(("correlation", "most"), [(0.0, 1.01), (3.0, 1.02)])
def test_lost_gate_mass_is_near_the_least_there_is(correlation, most):
    generator = torch.Generator().manual_seed(0)
    ranks, tokens, experts, k, eps = 4, 96, 16, 4, 0.05
    common = correlation * torch.randn(experts, generator=generator)
    push = torch.zeros(experts)
    push[:4] = 1.5
    gates_STE = torch.sigmoid(torch.randn(ranks, tokens, experts, generator=generator) + common + push)
    decisions, cap, fitted = _all_sources(gates_STE, k, eps)
    routed = sum(decision.gates_TE.double().sum().item() for decision in decisions)
    lost = routed - sum(fit.gates_TE.double().sum().item() for fit in fitted)
    least = routed - _most_gate_mass(gates_STE.flatten(0, 1).double().numpy(), k, cap.item(), ranks)
    assert 0.01 * routed < least <= lost + 1e-6 < most * least


def test_a_decision_without_fallback_gates_is_refused():
    routed = torch.tensor([[True, False]] * 2)
    decision = RoutingDecision(routed.float(), routed, None, torch.ones(2), routed.sum(1), None)
    with pytest.raises(ValueError, match="needs fallback_gates_TE"):
        fit_sources([decision], 2, 1, 0.0)
