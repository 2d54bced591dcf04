"""Claims about fitting one source's slots to its quota and room."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.moe.decision import RoutingDecision
from megatron_anyexperts.moe.reroute import fit_to_plan


def _decision(logits, routed, importance, eligible=None):
    score = torch.sigmoid(logits)
    fallback = score * ~routed if eligible is None else score * (~routed & eligible)
    return RoutingDecision(score * routed, routed, None, importance, routed.sum(1), fallback)


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
    fitted = fit_to_plan(decision, quota, room, k_max)
    kept = fitted.routing_map_TE & decision.routing_map_TE
    rerouted = fitted.routing_map_TE & ~decision.routing_map_TE
    given_up = decision.routing_map_TE & ~kept
    assert (_per_rank(kept, len(quota)) == torch.minimum(quota, _per_rank(decision.routing_map_TE, len(quota)))).all()
    assert (_per_rank(rerouted, len(quota)) <= room).all()
    assert (rerouted.sum(1) <= given_up.sum(1)).all()
    assert fitted.rerouted == rerouted.sum()
    assert fitted.rerouted + fitted.displaced == given_up.sum()


@given(problems())
def test_slots_given_up_have_the_lowest_priority_of_their_rank(problem):
    decision, quota, room, k_max = problem
    fitted = fit_to_plan(decision, quota, room, k_max)
    priority = decision.importance_T[:, None] * decision.gates_TE
    kept = fitted.routing_map_TE & decision.routing_map_TE
    given_up = decision.routing_map_TE & ~kept
    local = priority.shape[1] // len(quota)
    for rank in range(len(quota)):
        columns = slice(rank * local, (rank + 1) * local)
        low, high = priority[:, columns][given_up[:, columns]], priority[:, columns][kept[:, columns]]
        assert not len(low) or not len(high) or low.max() <= high.min()


@given(problems())
def test_gates_follow_the_slots_and_virtual_slots_keep_theirs(problem):
    decision, quota, room, k_max = problem
    fitted = fit_to_plan(decision, quota, room, k_max)
    kept = fitted.routing_map_TE & decision.routing_map_TE
    rerouted = fitted.routing_map_TE & ~decision.routing_map_TE
    assert torch.equal(fitted.gates_TE, decision.gates_TE * kept + decision.fallback_gates_TE * rerouted)
    assert (decision.fallback_gates_TE[rerouted] > 0).all()
    given_up = decision.gates_TE * (decision.routing_map_TE & ~kept)
    virtual_T = (decision.routing_map_TE & ~kept).sum(1) - rerouted.sum(1)
    smallest = torch.where(decision.routing_map_TE & ~kept, given_up, torch.inf).sort(1).values
    expected = smallest.where(torch.arange(smallest.shape[1]) < virtual_T[:, None], 0).sum(1)
    torch.testing.assert_close(fitted.displaced_gate_T, expected)


@given(problems())
def test_a_slot_becomes_virtual_only_if_no_eligible_expert_has_room(problem):
    decision, quota, room, k_max = problem
    fitted = fit_to_plan(decision, quota, room, k_max)
    rerouted = fitted.routing_map_TE & ~decision.routing_map_TE
    left = room - _per_rank(rerouted, len(quota))
    open_TE = (
        (decision.fallback_gates_TE > 0) & ~rerouted & (left > 0).repeat_interleave(rerouted.shape[1] // len(quota))
    )
    # Up to 2 x k_max candidates are looked at.
    seen = (decision.fallback_gates_TE > 0).sum(1) <= 2 * k_max
    virtual_T = decision.routing_map_TE.sum(1) - fitted.routing_map_TE.sum(1)
    assert not ((virtual_T > 0) & open_TE.any(1) & seen).any()


@given(problems())
def test_enough_quota_changes_nothing(problem):
    decision, quota, room, k_max = problem
    fitted = fit_to_plan(decision, _per_rank(decision.routing_map_TE, len(quota)), room, k_max)
    assert torch.equal(fitted.gates_TE, decision.gates_TE)
    assert torch.equal(fitted.routing_map_TE, decision.routing_map_TE)
    assert not fitted.displaced_gate_T.any() and not fitted.rerouted and not fitted.displaced


def test_the_more_important_token_keeps_its_expert_and_the_other_takes_its_next_best():
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0], [3.0, 0.0, 1.0, -1.0]])
    routed = torch.tensor([[True, False, False, False]] * 2)
    decision = _decision(logits, routed, importance=torch.tensor([0.9, 0.1]))
    fitted = fit_to_plan(decision, quota_P=torch.tensor([1, 0]), room_P=torch.tensor([0, 1]), k_max=1)
    assert fitted.routing_map_TE.tolist() == [[True, False, False, False], [False, False, True, False]]
    assert fitted.gates_TE[1, 2] == torch.sigmoid(torch.tensor(1.0))


def test_gradients_reach_kept_rerouted_and_virtual_gates():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    routed = logits.detach().argsort(1, descending=True).argsort(1) < 2
    mix = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    quota, room = torch.tensor([3, 4]), torch.tensor([0, 2])

    def output(logits):
        fitted = fit_to_plan(_decision(logits, routed, torch.full((6,), 0.5)), quota, room, 2)
        assert fitted.rerouted > 0 and fitted.displaced > 0
        return (fitted.gates_TE * mix).sum() + fitted.displaced_gate_T.square().sum()

    assert torch.autograd.gradcheck(output, logits)


def test_a_decision_without_fallback_gates_is_refused():
    routed = torch.ones(1, 2, dtype=torch.bool)
    decision = RoutingDecision(routed.float(), routed, None, torch.ones(1), routed.sum(1), None)
    with pytest.raises(ValueError, match="needs fallback_gates_TE"):
        fit_to_plan(decision, torch.tensor([1, 0]), torch.tensor([0, 1]), 2)
