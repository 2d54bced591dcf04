"""Elastic layouts keep batches and data order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.survival.layout import Layout, Shape, fit, read_flags

powers = st.sampled_from([1, 2, 4, 8])


@given(st.integers(1, 40), powers, powers, powers, powers, st.integers(1, 64), powers, st.sampled_from([None, 8, 48]))
def test_a_layout_is_valid_and_the_largest(available, per_node, tensor, pipeline, expert, batches, micro, streams):
    shape = Shape(tensor, pipeline, 1, expert, batches * micro, micro, streams)

    def valid(nodes: int) -> bool:
        data, rest = divmod(nodes * per_node, tensor * pipeline)
        return bool(data) and not rest and batches % data == 0 and (streams is None or streams % data == 0)

    usable = [nodes for nodes in range(1, available + 1) if valid(nodes)]
    if not usable:
        with pytest.raises(ValueError, match="no layout for 1 to"):
            fit(available, per_node, shape)
        return
    found = fit(available, per_node, shape)
    assert found.nodes == max(usable)
    assert expert % found.expert == 0
    assert found.nodes * per_node // pipeline % found.expert == 0


def test_expert_parallelism_shrinks_with_the_ranks():
    shape = Shape(expert=8, global_batch=64, data_streams=64)
    assert fit(2, 8, shape) == Layout(2, 8)
    assert fit(1, 4, shape) == Layout(1, 4)


def test_a_count_of_nodes_that_breaks_the_data_order_is_left_out():
    assert fit(3, 1, Shape(global_batch=8, data_streams=4)).nodes == 2
    with pytest.raises(ValueError, match="4 data streams"):
        fit(3, 1, Shape(global_batch=8, data_streams=4), minimum=3)


def test_flags_come_from_the_file_and_the_command_line_wins():
    text = "# comment\nexpert-model-parallel-size: 4  # per stage\nglobal_batch_size: 16\nlist:\n- a: 1\n"
    flags = read_flags(["--config", "x.yaml", "--expert-model-parallel-size=2", "--bf16"], text)
    assert Shape.from_flags(flags) == Shape(expert=2, global_batch=16, data_streams=DataConfig().data_streams)


@pytest.mark.parametrize("words", [["--unset", "expert-model-parallel-size"], ["--unset=expert_model_parallel_size"]])
def test_an_unset_flag_has_its_default_unless_the_command_line_gives_it(words):
    text = "expert_model_parallel_size: 4\ndata-streams: 64\n"
    unset = read_flags([*words, "--unset", "data-streams"], text)
    assert Shape.from_flags(unset) == Shape(data_streams=DataConfig().data_streams)
    given = read_flags(["--expert-model-parallel-size", "2", *words], text)
    assert Shape.from_flags(given) == Shape(expert=2, data_streams=64)


@pytest.mark.parametrize("value", ["null", "~", "false"])
def test_a_flag_that_the_file_leaves_out_has_its_default(value):
    flags = read_flags([], f"global-batch-size: {value}\ndata-streams: 8\n")
    assert Shape.from_flags(flags) == Shape(data_streams=8)
