"""Claims about the way from logical to physical experts."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.moe.copies import plan_copies
from megatron_anyexperts.moe.decision import RoutingDecision
from megatron_anyexperts.moe.physical_experts import lay_out, on_physical_experts


def _decision(rng, tokens: int, experts: int, hot: int) -> RoutingDecision:
    """Random slots, most tokens with one for the expert `hot`; gates and fallbacks are positive."""
    map_TE = torch.from_numpy(rng.random((tokens, experts)) < 0.3)
    map_TE[:, hot] |= torch.from_numpy(rng.random(tokens) < 0.8)
    gates_TE = torch.from_numpy(rng.random((tokens, experts)) + 0.1)
    return RoutingDecision(
        gates_TE=gates_TE * map_TE,
        routing_map_TE=map_TE,
        virtual_gate_T=None,
        importance_T=torch.ones(tokens),
        slots_T=map_TE.sum(1),
        fallback_gates_TE=gates_TE * ~map_TE,
        eligible_TE=torch.from_numpy(rng.random((tokens, experts)) < 0.9),
    )


@given(st.sampled_from([(2, 3), (4, 2), (8, 1)]), st.sampled_from([1, 2]), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_each_slot_goes_to_one_physical_expert_of_its_logical_one_as_planned(shape, per_expert_rank, places, seed):
    (ranks, local), rng = shape, np.random.default_rng(seed)
    experts, sources = ranks * local, ranks * per_expert_rank
    hot = int(rng.integers(experts))
    decisions = [_decision(rng, int(rng.integers(0, 40)), experts, hot) for _ in range(sources)]
    counts_SE = torch.stack([d.routing_map_TE.sum(0) for d in decisions]).numpy()
    plan = plan_copies(counts_SE, ranks, places, 0.0)
    physical = lay_out(counts_SE, ranks, places, plan)

    width = local + places
    assert physical.expert_Q[physical.owned_Q].tolist() == list(range(experts))
    assert physical.owned_Q.view(ranks, width)[:, :local].all() and int(physical.owned_Q.sum()) == experts
    load_P = plan.load(counts_SE.sum(0), ranks)
    assert physical.slots_SQ.view(sources, ranks, width).sum((0, 2)).tolist() == load_P.tolist()
    for source, decision in enumerate(decisions):
        moved = on_physical_experts(decision, physical, source)
        assert torch.equal(moved.routing_map_TE.sum(0), physical.slots_SQ[source])
        for whole, parts in (
            (decision.routing_map_TE.long(), moved.routing_map_TE.long()),
            (decision.gates_TE, moved.gates_TE),
            (decision.fallback_gates_TE, moved.fallback_gates_TE),
        ):
            assert torch.equal(torch.zeros_like(whole).index_add(1, physical.expert_Q, parts), whole)
        # A slot may move to an expert itself, and not to one that the token has, wherever that is computed.
        assert not moved.eligible_TE[:, ~physical.owned_Q].any()
        allowed_TE = decision.eligible_TE & ~decision.routing_map_TE
        assert torch.equal(moved.eligible_TE[:, physical.owned_Q], allowed_TE)
    received_Q = physical.slots_SQ.sum(0)
    assert physical.per_logical(received_Q, experts).tolist() == counts_SE.sum(0).tolist()
    copied = plan.flow_GS[plan.rank_G != plan.expert_G // local].sum()
    assert int(physical.slots_of_copies(received_Q)) == copied
