"""Traffic, time, copies and the search: what must hold of any layout."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_anyexperts.checks.plan_copies import copy_costs
from megatron_anyexperts.checks.plan_layout import refusal
from megatron_anyexperts.checks.plan_memory import Precision
from megatron_anyexperts.checks.plan_parameters import by_part, stages
from megatron_anyexperts.checks.plan_search import examine, neighbours, search
from megatron_anyexperts.checks.plan_time import Feed, step_time
from megatron_anyexperts.checks.plan_traffic import data_exchange, distinct, expert_exchange, tensor_exchange
from megatron_anyexperts.checks.plan_work import training_operations
from megatron_anyexperts.hardware import ASSUMED, GPUS
from tests.unit.checks.planned import MIXTURE, SEQUENCE, layout, setting
from tests.unit.checks.test_plan_memory import layouts


@given(job=layouts())
@settings(max_examples=60)
def test_every_slot_that_leaves_its_rank_is_sent(job):
    sent = expert_exchange(MIXTURE, job)
    slots = 2 * MIXTURE.hidden * job.tokens * MIXTURE.mixture.real
    assert sent.nvlink + sent.network == pytest.approx(slots * (1 - 1 / job.expert))
    assert sent.network == 0 or job.expert > 8
    once = expert_exchange(MIXTURE, job, once=True)
    assert once.nvlink <= slots and once.network <= sent.network + 1e-6
    assert tensor_exchange(MIXTURE, job, "*").nvlink == 0 or job.tensor > 1


@given(slots=st.floats(1, 16), places=st.integers(1, 64), reach=st.floats(0.1, 1))
def test_different_places_are_between_one_and_all(slots, places, reach):
    assert 1 - 1e-9 <= distinct(slots, places, reach) <= min(slots, places) + 1e-9


def test_distinct_places_are_counted_for_a_case_by_hand():
    # Two slots on two nodes: the same one half of the time.
    assert distinct(2, 2, 1.0) == 1.5 and distinct(8, 8, 1 / 8) == 1


def test_a_ring_through_a_node_shares_its_links():
    sizes, precision = replace(MIXTURE, pattern="*-" * 4, mixture=None, vision=None), Precision()
    sent = data_exchange(sizes, layout(expert=1), precision, stages(sizes, 1)[0])
    bytes_ = 6 * sum(by_part(sizes).values()) * 63 / 64
    assert sent.nvlink == pytest.approx(bytes_) and sent.network == pytest.approx(bytes_ / 8)
    assert data_exchange(sizes, layout(8, expert=1), precision, stages(sizes, 1)[0]).network == 0


@given(job=layouts(), name=st.sampled_from(["bf16", "grouped", "attention", "hbm", "nvlink", "network"]))
@settings(max_examples=60)
def test_what_reaches_more_takes_no_longer(job, name):
    faster = replace(ASSUMED, **{name: getattr(ASSUMED, name) * 1.1})
    slow, fast = (step_time(setting(reached=reached), job).total for reached in (ASSUMED, faster))
    assert 0 < fast <= slow * (1 + 1e-12)


@given(job=layouts())
@settings(max_examples=40)
def test_no_step_beats_the_peak(job):
    tokens = job.global_batch * SEQUENCE / job.gpus
    least = tokens * training_operations(MIXTURE, SEQUENCE) / GPUS["h100"].bf16
    assert step_time(setting(), job).total > least


def test_recomputation_pictures_and_more_documents_change_the_time():
    plain = step_time(setting(), layout()).total
    assert step_time(setting(), layout(recompute=frozenset({"full"}))).total > plain
    assert step_time(setting(feed=Feed(SEQUENCE, pictures=0.5)), layout()).total > plain
    assert step_time(setting(feed=Feed(256)), layout()).total < plain
    assert step_time(setting(precision=Precision(fp8=True)), layout()).seconds["products of experts"] < (
        step_time(setting(), layout()).seconds["products of experts"]
    )


@given(imbalance=st.floats(1.0, 4.0), gpu=st.sampled_from(sorted(GPUS)))
def test_a_copy_pays_from_its_slots_on(imbalance, gpu):
    chosen, job = setting(gpu=GPUS[gpu]), layout()
    for cost in copy_costs(chosen, job).values():
        mean = job.tokens * MIXTURE.mixture.real
        moved = (imbalance - 1) * mean
        assert (imbalance >= cost.imbalance) == (moved >= cost.slots - 1e-6) or math.isclose(imbalance, cost.imbalance)
    nvlink, network = copy_costs(chosen, job).values()
    assert network.seconds > nvlink.seconds and network.slots > nvlink.slots


REFUSED = [
    ({"tensor": 3}, "does not divide 64 GPUs"), ({"expert": 48}, "does not divide 64 GPUs"),
    ({"expert": 64, "pipeline": 2}, "does not divide 64 GPUs"), ({"tensor": 16}, "groups of heads"),
    ({"pipeline": 32, "expert": 1}, "does not divide the layers"), ({"global_batch": 100}, "does not divide 100 rows"),
]  # fmt: skip


@pytest.mark.parametrize("changes, why", REFUSED)
def test_a_layout_that_cannot_be_had_says_why(changes, why):
    assert why in refusal(MIXTURE, layout(**changes))


def test_the_search_finds_the_fastest_that_fits():
    found = search(setting(), layout())
    best = found[0]
    fitting = [each for each in found if each.reason is None]
    assert best.reason is None and all(each.step.total >= best.step.total for each in fitting)
    assert any(each.layout == layout() for each in found)
    room = GPUS["h100"].memory * ASSUMED.fill
    assert all((each.memory.most <= room) == (each.reason is None) for each in found if each.memory)
    near = neighbours(found)
    assert near and all(why for _, why in near)
    # A neighbour is one choice away, and none is faster.
    assert all(why.startswith(("+", "needs", "TP", "PP", "EP", "micro")) for _, why in near)


def test_what_does_not_fit_is_not_chosen():
    tight = replace(GPUS["h100"], memory=GPUS["h100"].memory / 8)
    small, large = search(setting(gpu=tight), layout())[0], search(setting(), layout())[0]
    assert small.reason or small.memory.most <= tight.memory * ASSUMED.fill < large.memory.most
    assert examine(setting(gpu=tight), large.layout).reason.startswith("needs ")
