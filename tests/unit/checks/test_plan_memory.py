"""Bytes of a GPU and of a host: what must hold of any layout."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_anyexperts.checks.plan_layout import Layout, refusal
from megatron_anyexperts.checks.plan_memory import (
    Precision,
    fullest,
    layer_bytes,
    stage_memory,
    static_bytes,
    worst_slots,
)
from megatron_anyexperts.checks.plan_parameters import Stage, by_part, stage_parameters, stages
from megatron_anyexperts.checks.plan_save import save
from megatron_anyexperts.hardware import GIB
from tests.unit.checks.planned import MIXTURE, SEQUENCE, layout

MODULES = ("layernorm", "moe_act", "mlp", "moe", "core_attn", "shared_experts")
modules = st.frozensets(st.sampled_from(MODULES))


@st.composite
def layouts(draw) -> Layout:
    """Any that `MIXTURE` can be laid out in."""
    tensor, pipeline, expert = (draw(st.sampled_from(sizes)) for sizes in ((1, 2, 4, 8), (1, 2, 4, 8), (1, 4, 8, 16)))
    found = layout(128, tensor=tensor, pipeline=pipeline, expert=expert, micro_batch=draw(st.sampled_from((1, 2, 4))),
                   recompute=draw(modules))  # fmt: skip
    assert refusal(MIXTURE, found) is None
    return found


@given(less=modules, more=modules, letter=st.sampled_from("*-E"), operand=st.sampled_from([1, 2]))
def test_recomputing_more_keeps_no_more(less, more, letter, operand):
    kept = [layer_bytes(MIXTURE, letter, chosen, operand) for chosen in (less | more, less, frozenset())]
    assert 2 * MIXTURE.hidden <= kept[0] <= kept[1] <= kept[2]
    assert layer_bytes(MIXTURE, letter, frozenset({"full"}), operand) <= kept[0]


@given(job=layouts())
@settings(max_examples=60)
def test_memory_grows_with_the_microbatch_and_shrinks_with_data_parallelism(job):
    memory = fullest(MIXTURE, job, Precision())
    larger = fullest(MIXTURE, replace(job, micro_batch=2 * job.micro_batch), Precision())
    # Fewer microbatches can be fewer at once in a pipeline.
    if job.microbatches // 2 >= job.pipeline:
        assert larger.most > memory.most
    wider = fullest(MIXTURE, replace(job, gpus=256, global_batch=2048), Precision())
    assert wider.static <= memory.static and wider.activations == memory.activations
    assert fullest(MIXTURE, job, Precision(distributed=False)).static >= memory.static
    assert memory.exchange <= memory.exchange_worst


@given(job=layouts())
@settings(max_examples=60)
def test_the_parameters_of_all_ranks_are_the_models(job):
    """With a byte for each parameter, gradient and state, over tensor, expert and pipeline ranks, nothing is lost."""
    experts = job.expert * job.expert_tensor
    held = 0.0
    for stage in stages(MIXTURE, job.pipeline):
        for each in stage_parameters(MIXTURE, stage):
            copies = {"tensor": job.tensor, "expert": experts, "whole": 1}[each.spread]
            held += each.local(job.tensor, experts) * copies
    assert held == pytest.approx(sum(by_part(MIXTURE).values()))


def test_the_first_stage_keeps_most_microbatches():
    job = layout(pipeline=4, global_batch=1024)
    memory = [stage_memory(MIXTURE, job, Precision(), stage, rank) for rank, stage in enumerate(stages(MIXTURE, 4))]
    assert memory[0].activations == pytest.approx(4 * memory[3].activations)
    assert memory[0].pictures > 0 and memory[1].pictures == memory[3].pictures == 0
    assert memory[3].logits > 0 and memory[0].logits == 0


def test_a_cap_bounds_the_worst_step():
    mixture, job = MIXTURE.mixture, layout()
    everything = worst_slots(mixture, job)
    # Eight ranks send each token's eight slots to one, which has eight experts of the 64.
    assert everything == 8 * SEQUENCE * 8
    assert worst_slots(replace(mixture, limit=1.05), job) == pytest.approx(1.05 * SEQUENCE * 8)
    assert worst_slots(replace(mixture, experts=16), job) == 8 * SEQUENCE * 2


def test_fp32_parameters_are_their_own_masters():
    narrow = [each for each in stage_parameters(MIXTURE, Stage("", False, True)) if each.part == "norms"]
    wide = [replace(each, wide=True) for each in narrow]
    job, number = layout(), sum(each.number for each in narrow)
    alone = Precision(distributed=False)
    assert static_bytes(narrow, job, alone) == 18 * number
    assert static_bytes(wide, job, alone) == 16 * number


def test_a_checkpoint_holds_weights_and_state_once():
    number = sum(by_part(MIXTURE).values())
    stored = save(MIXTURE, layout(), Precision(), write=1e9)
    assert stored.stored == 14 * number and stored.stall == pytest.approx(14 * number / 1e9)
    assert save(MIXTURE, layout(expert=16), Precision(), write=1e9).stored == stored.stored
    assert save(MIXTURE, layout(pipeline=4), Precision(), 1e9).stored == stored.stored
    assert stored.stored / GIB > 1


def test_a_save_needs_a_ranks_part_of_the_checkpoint():
    of_one = save(MIXTURE, layout(gpus=8), Precision(), write=1e9)
    assert of_one.shard * 8 == pytest.approx(of_one.stored) == pytest.approx(of_one.host)
    assert of_one.host_most == 2 * of_one.host
    for job in (layout(gpus=64), layout(gpus=64, expert=16), layout(gpus=64, tensor=2), layout(gpus=64, expert=1)):
        many = save(MIXTURE, job, Precision(), write=1e9)
        # What tensor-parallel ranks have whole is stored by the first of them.
        assert of_one.shard / 8 <= many.shard * (1 + 1e-12) and many.shard < 1.05 * of_one.shard / 8
    halves = save(MIXTURE, layout(gpus=64, pipeline=2), Precision(), write=1e9)
    assert of_one.shard / 8 < halves.shard < 2 * of_one.shard / 8
