"""The kernels of prices equal their definition; in Triton's interpreter where there is no GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_anyexperts.moe import prices
from megatron_anyexperts.moe.cap import fit_sources
from megatron_anyexperts.moe.decision import RoutingDecision
from megatron_anyexperts.moe.kernels import HAS_TRITON
from megatron_anyexperts.moe.prices import Offers, aim_at, choose, count_margins, next_prices, offers
from tests.unit.moe.test_fused_route import DEVICE

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")


@st.composite
def decisions(draw) -> tuple[RoutingDecision, int, int]:
    """A decision of some tokens, how many ranks there are, and the most slots of a token."""
    ranks, local = draw(st.sampled_from([1, 2, 3, 8])), draw(st.integers(1, 5))
    tokens, experts = draw(st.integers(0, 11)), ranks * local
    k_max = draw(st.integers(1, min(6, experts)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    gates_TE = torch.rand(tokens, experts, generator=generator).to(dtype)
    if draw(st.booleans()):
        gates_TE = gates_TE.round()  # many ties, and gates of 0
    order_TE = torch.rand(gates_TE.shape, generator=generator).argsort(1)
    map_TE = order_TE < torch.randint(0, k_max + 1, (tokens, 1), generator=generator)
    eligible_TE = (torch.rand(gates_TE.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))) & ~map_TE
    importance_T, slots_T = torch.rand(tokens, generator=generator), map_TE.sum(1)
    parts = gates_TE * map_TE, map_TE, importance_T, slots_T, gates_TE * eligible_TE, eligible_TE
    gates, chosen, importance, slots, fallback, eligible = (part.to(DEVICE) for part in parts)
    return RoutingDecision(gates, chosen, None, importance, slots, fallback, eligible), ranks, k_max


@settings(max_examples=30)
@given(decisions(), st.integers(0, 2**32), st.integers(0, prices.ROUNDS - 1), st.sampled_from([1.0, 1.1, 1.5]))
def test_each_kernel_equals_its_definition(problem, seed, number, factor):
    decision, ranks, k_max = problem
    value_TE, slots_T = offers(decision), decision.routing_map_TE.sum(1)
    fused = Offers.of(decision, k_max, fused=True)
    torch.testing.assert_close(fused.value_TE, value_TE, rtol=0 if DEVICE == "cpu" else 1e-6, atol=0)
    assert torch.equal(fused.slots_T, slots_T)
    fused = Offers(value_TE, slots_T, k_max, fused=True)
    price_P = torch.rand(ranks, generator=torch.Generator().manual_seed(seed)).to(DEVICE) * (number > 0)
    counted, expected = torch.zeros(2, ranks, 2 * prices.LEVELS, dtype=torch.int64, device=DEVICE)
    fused.count(price_P, counted)
    count_margins(value_TE, slots_T, price_P, expected)
    assert torch.equal(counted, expected)
    assert torch.equal(fused.choose(price_P), choose(value_TE, slots_T, price_P))
    slots = slots_T.sum().item()
    limits = int(factor * slots / ranks) + 1, slots, number
    found_P = prices.fused_prices.next_prices(price_P, expected, *limits)
    torch.testing.assert_close(found_P, next_prices(price_P, expected, *limits), rtol=1e-6, atol=1e-9)
    assert aim_at(limits[0], slots, ranks, number) <= limits[0]


@settings(max_examples=8)
@given(st.integers(2, 4), st.integers(0, 2**32))
def test_sources_end_with_the_same_slots(ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    sources = []
    for _ in range(ranks):
        gates = torch.rand(9, 3 * ranks, generator=generator) + torch.linspace(1, 0, 3 * ranks)
        chosen = torch.zeros_like(gates, dtype=torch.bool).scatter_(1, gates.topk(2, dim=1).indices, True)
        parts = gates * chosen, chosen, torch.ones(9), chosen.sum(1), gates * ~chosen, ~chosen
        gates, chosen, importance, slots, fallback, eligible = (part.to(DEVICE) for part in parts)
        sources.append(RoutingDecision(gates, chosen, None, importance, slots, fallback, eligible))
    with_kernels, without = (fit_sources(sources, ranks, 2, 0.1, fused).fitted for fused in (True, False))
    for fused, fitted in zip(with_kernels, without, strict=True):
        assert torch.equal(fused.routing_map_TE, fitted.routing_map_TE)


@settings(max_examples=30)
@given(decisions())
def test_without_prices_the_routers_choice_stands(problem):
    decision, ranks, _ = problem
    chosen_TE = choose(offers(decision), decision.routing_map_TE.sum(1), torch.zeros(ranks, device=DEVICE))
    assert torch.equal(chosen_TE, decision.routing_map_TE)
