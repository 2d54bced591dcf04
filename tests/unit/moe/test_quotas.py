"""Claims about the dispatch plan, over random and adversarial demand matrices."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_anyexperts.moe.quotas import _largest_remainder, plan_dispatch, slot_cap

EPS = st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.5, 3.0])


@st.composite
def demands(draw) -> Tensor:
    """Demand of S sources for P ranks, made of E <= 512 experts: skewed, sparse, empty, concentrated."""
    ranks = draw(st.integers(1, 64))
    local_experts = draw(st.integers(1, max(1, 512 // ranks)))
    sources = ranks * draw(st.sampled_from([1, 1, 2]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    high = draw(st.sampled_from([1, 3, 50, 4096]))
    demand_SPL = torch.randint(0, high + 1, (sources, ranks, local_experts), generator=generator)
    shape = draw(st.sampled_from(["random", "one hot expert", "hot rank", "one source", "empty ranks", "diagonal"]))
    if shape == "one hot expert":
        demand_SPL[:, -1, 0] *= 1000
    elif shape == "hot rank":
        demand_SPL[:, 1:] = 0
    elif shape == "one source":
        demand_SPL[1:] = 0
    elif shape == "empty ranks":
        demand_SPL[::2] = 0
        demand_SPL[:, ::3] = 0
    elif shape == "diagonal":
        demand_SPL *= torch.eye(sources, ranks, dtype=torch.int64)[:, :, None]
    return demand_SPL.sum(2)


def _plan(demand: Tensor, eps: float):
    return plan_dispatch(demand, slot_cap(demand.sum(), demand.shape[1], eps))


@given(demands(), EPS)
def test_no_rank_receives_more_than_the_cap(demand, eps):
    plan = _plan(demand, eps)
    assert plan.cap == math.ceil((1 + Fraction(str(eps))) * demand.sum().item() / demand.shape[1])
    assert (plan.quota_SP >= 0).all() and (plan.room_SP >= 0).all()
    assert ((plan.quota_SP + plan.room_SP).sum(0) <= plan.cap).all()


@given(demands(), EPS)
def test_demand_for_ranks_under_the_cap_is_untouched_and_ranks_over_it_are_filled_to_it(demand, eps):
    plan = _plan(demand, eps)
    over = demand.sum(0) > plan.cap
    assert torch.equal(plan.quota_SP[:, ~over], demand[:, ~over])
    assert (plan.quota_SP[:, over].sum(0) == plan.cap).all()
    if not over.any():
        assert not plan.room_SP.any()


@given(demands(), EPS)
def test_quotas_are_the_proportional_share_rounded_by_largest_remainder(demand, eps):
    plan = _plan(demand, eps)
    load = demand.sum(0)
    for rank in (load > plan.cap).nonzero().flatten().tolist():
        shares = [Fraction(d * plan.cap.item(), load[rank].item()) for d in demand[:, rank].tolist()]
        extra = [q - math.floor(s) for q, s in zip(plan.quota_SP[:, rank].tolist(), shares, strict=True)]
        assert set(extra) <= {0, 1}
        rounded_up = [s % 1 for s, e in zip(shares, extra, strict=True) if e]
        rounded_down = [s % 1 for s, e in zip(shares, extra, strict=True) if not e]
        assert min(rounded_up, default=1) >= max(rounded_down, default=0)


@given(demands(), EPS)
def test_room_is_all_that_is_left_shared_in_proportion_to_what_is_given_up(demand, eps):
    plan = _plan(demand, eps)
    given_up = (demand - plan.quota_SP).sum(1)
    room = (plan.cap - demand.sum(0)).clamp_min(0)
    if given_up.sum() == 0:
        return
    assert torch.equal(plan.room_SP.sum(0), room)
    assert room.sum() >= given_up.sum()
    exact = given_up[:, None].double() * room / given_up.sum()
    assert ((plan.room_SP - exact).abs() < 1).all()


def test_scarce_room_does_not_always_go_to_the_same_sources():
    demand = torch.full((64, 64), 10)
    demand[:, 0] = 13
    plan = plan_dispatch(demand, demand.sum() // 64 + 1)
    assert (plan.room_SP.max(), plan.room_SP.sum(0)[1:].unique().tolist()) == (1, [4])
    assert (plan.room_SP.sum(1) >= (demand - plan.quota_SP).sum(1)).all() and plan.room_SP.sum(1).max() <= 5


@given(demands(), EPS)
def test_the_plan_does_not_depend_on_memory_layout_or_threads(demand, eps):
    plan, other = _plan(demand, eps), _plan(demand.T.contiguous().T.clone(), eps)
    assert torch.equal(plan.quota_SP, other.quota_SP) and torch.equal(plan.room_SP, other.room_SP)


@given(demands(), EPS)
def test_scaling_every_rank_as_on_a_gpu_equals_scaling_those_over_the_cap(demand, eps):
    plan = _plan(demand, eps)
    seats, ranks = torch.minimum(demand.sum(0), plan.cap), torch.arange(demand.shape[1])
    assert torch.equal(_largest_remainder(demand, seats, ranks), plan.quota_SP)


@given(st.integers(1, 2**26), st.integers(1, 1024), st.integers(0, 2 * 10**6))
def test_cap_is_the_exact_ceiling(slots, ranks, millionths):
    eps = millionths / 10**6
    exact = math.ceil((1 + Fraction(millionths, 10**6)) * slots / ranks)
    assert slot_cap(torch.tensor(slots), ranks, eps).item() == exact


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_largest_real_steps_are_planned_exactly(seed):
    generator = torch.Generator().manual_seed(seed)
    demand = torch.randint(0, 2**18 // 256 * 2, (256, 256), generator=generator)
    demand[:, seed % 256] = 2**17
    plan = _plan(demand, 0.05)
    assert (plan.quota_SP.sum(0) == torch.minimum(demand.sum(0), plan.cap)).all()
    assert (plan.quota_SP <= demand).all()


@pytest.mark.parametrize("eps", [-0.01, float("inf"), float("nan")])
def test_an_infeasible_or_unbounded_eps_is_refused(eps):
    with pytest.raises(ValueError, match="use eps >= 0"):
        slot_cap(torch.tensor(10), 2, eps)


def test_a_cap_below_the_mean_is_refused_naming_the_smallest_feasible_one():
    with pytest.raises(ValueError, match=r"cap=4 on 2 expert ranks holds 8 slots, but 9 .* at least 5"):
        plan_dispatch(torch.tensor([[9, 0], [0, 0]]), 4)
