"""The kernels of prices equal their definition, in Triton's interpreter; and that they compile for a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_anyexperts.moe import fused_prices, price_rounds
from megatron_anyexperts.moe.cap import fit_sources
from megatron_anyexperts.moe.decision import RoutingDecision
from megatron_anyexperts.moe.kernels import HAS_TRITON
from megatron_anyexperts.moe.prices import Offers, choose, count_margins, next_prices, offers

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")


def _decision(gates_TE, map_TE, importance_T, eligible_TE) -> RoutingDecision:
    parts = gates_TE * map_TE, map_TE, None, importance_T, map_TE.sum(1), gates_TE * eligible_TE, eligible_TE
    return RoutingDecision(*parts)


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
    importance_T = torch.rand(tokens, generator=generator)
    return _decision(gates_TE, map_TE, importance_T, eligible_TE), ranks, k_max


@settings(max_examples=8)
@given(decisions(), st.integers(0, 2**32), st.integers(0, price_rounds.ROUNDS - 1), st.sampled_from([1.0, 1.1, 1.5]))
def test_each_kernel_equals_its_definition(problem, seed, number, factor):
    decision, ranks, k_max = problem
    value_TE, slots_T = offers(decision), decision.routing_map_TE.sum(1)
    fused = Offers.of(decision, k_max, fused=True)
    torch.testing.assert_close(fused.value_TE, value_TE, rtol=1e-6, atol=0)
    assert torch.equal(fused.slots_T, slots_T)
    fused = Offers(value_TE, decision.routing_map_TE, slots_T, k_max, fused=True)
    price_P = torch.rand(ranks, generator=torch.Generator().manual_seed(seed)) * (number > 0)
    counted, expected = torch.zeros(2, ranks, 2 * price_rounds.LEVELS, dtype=torch.int64)
    fused.count(price_P, counted)
    count_margins(value_TE, slots_T, price_P, expected)
    assert torch.equal(counted, expected)
    chosen_TE, moved = fused.choose(price_P)
    assert torch.equal(chosen_TE, choose(value_TE, slots_T, price_P))
    assert moved == (chosen_TE & ~decision.routing_map_TE).sum()
    slots = slots_T.sum().item()
    limits = int(factor * slots / ranks) + 1, slots, number
    found_P = fused_prices.next_prices(price_P, expected, *limits)
    torch.testing.assert_close(found_P, next_prices(price_P, expected, *limits), rtol=1e-6, atol=1e-9)


@settings(max_examples=4)
@given(st.integers(2, 4), st.integers(0, 2**32))
def test_sources_end_with_the_same_slots(ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    sources = []
    for _ in range(ranks):
        gates = torch.rand(9, 3 * ranks, generator=generator) + torch.linspace(1, 0, 3 * ranks)
        chosen = torch.zeros_like(gates, dtype=torch.bool).scatter_(1, gates.topk(2, dim=1).indices, True)
        sources.append(_decision(gates, chosen, torch.ones(9), ~chosen))
    with_kernels, without = (fit_sources(sources, ranks, 2, 0.1, fused).fitted for fused in (True, False))
    for fused, fitted in zip(with_kernels, without, strict=True):
        assert torch.equal(fused.routing_map_TE, fitted.routing_map_TE)


@settings(max_examples=8)
@given(decisions())
def test_without_prices_the_routers_choice_stands(problem):
    decision, ranks, _ = problem
    chosen_TE = choose(offers(decision), decision.routing_map_TE.sum(1), torch.zeros(ranks))
    assert torch.equal(chosen_TE, decision.routing_map_TE)


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from megatron_anyexperts.moe import price_kernels as kernels, price_rounds as rounds

sizes = {"E": 256, "E2": 256, "L": 4, "K": 12, "P": 64, "P2": 64, "TOKENS": 4, "RANKS": 16, "RELATIVE": rounds.RELATIVE}
sizes |= {name: getattr(rounds, name) for name in ("LEVELS", "FIRST_LEVEL", "ABSOLUTE")}
types = {"routed_ptr": "*i1", "moved_ptr": "*i64"}
types |= {"map_ptr": "*i1", "eligible_ptr": "*i1", "slots_ptr": "*i64", "counts_ptr": "*i64", "above_ptr": "*i64"}
types |= dict.fromkeys(("T", "cap", "aim", "slots", "free", "shift_from"), "i32")
for kernel in (kernels.offer, kernels.count_margins, kernels.next_prices, kernels.choose):
    names = kernel.arg_names
    constants = {name: sizes[name] for name in names if name in sizes}
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    built = compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32))
    assert built.asm["cubin"], kernel
print("compiled")
"""


def test_they_compile_for_a_gpu(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.stdout.strip().endswith("compiled"), result.stderr
