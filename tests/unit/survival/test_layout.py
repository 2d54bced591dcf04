"""Elastic layouts keep batches and data order."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import event, given, settings
from hypothesis import strategies as st

from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.survival.layout import Layout, Shape, config_path, fit, read_flags
from megatron_anyexperts.training.config_files import read_config

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


SHIPPED = sorted((Path(__file__).resolve().parents[3] / "pretrain" / "configs").glob("*.yaml"))
NAMES = ["global-batch-size", "micro_batch_size", "data-streams", "expert-model-parallel-size", "bf16", "lr"]
SCALARS = [
    "16",
    "8  # each",
    '"4"',
    "'2'",
    "null",
    "~",
    "false",
    "No",
    "",
    "true",
    "1e-3",
    "0x10",
    "010",
    "1_000",
    "+4",
]
SCALARS += ['"4', "[1, 2]", "[1,", "&x 4", "!int 4", "|", ">-", "4 5", "text: 4", "-1", "0", '"null"', "'\"4\"'", "a#4"]
GOOD = st.builds("{}: {}".format, st.sampled_from(NAMES), st.sampled_from(["16", "8  # each", '"4"', "null", "No", ""]))
ODD = st.one_of(
    st.builds("{}{}:{}{}".format, st.sampled_from(["", "", "", "", " ", '"', "? "]), st.sampled_from(NAMES),
              st.sampled_from([" ", " ", " ", "", "\t"]), st.sampled_from(SCALARS)),
    st.builds('"{}": {}'.format, st.sampled_from(NAMES), st.sampled_from(SCALARS)),
    st.sampled_from(["# comment", "", "  # more", "---", "...", "- 4", "  - 4", "  5", '5"', "}", "]", "<<: {a: 1}"]),
)  # fmt: skip
TEXTS = st.builds(
    lambda good, odd, order: "\n".join(order.sample(good + odd, len(good + odd))),
    st.lists(GOOD, max_size=5, unique_by=lambda line: line.partition(":")[0]),
    st.lists(ODD, max_size=2),
    st.randoms(use_true_random=False),
)


def by_the_real_reader(text: str) -> Shape | None:
    """What training makes of the text: None if it refuses it."""
    try:
        config = yaml.safe_load(text) or {}
        flags = {str(key).replace("_", "-"): value for key, value in config.items()}
        return Shape.from_flags({key: str(value) for key, value in flags.items() if value not in (None, False)})
    except (yaml.YAMLError, AttributeError, ValueError):
        return None


@given(TEXTS)
@settings(max_examples=1000)
def test_what_is_read_is_what_the_real_reader_reads(text):
    try:
        found = Shape.from_flags(read_flags([], text))
    except ValueError as error:
        event("refused" if "configuration" in str(error) else "no number")
        return
    event("read")
    # Where training itself will refuse the file, its message is the better one.
    expected = by_the_real_reader(text)
    assert expected is None or found == expected


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_configurations_are_read(path):
    words = ["--config", path.stem]
    assert config_path(words) == path
    whole = yaml.safe_dump(read_config(path.stem), default_flow_style=False)
    assert Shape.from_flags(read_flags(words, path.read_text(), path)) == by_the_real_reader(whole)


def test_a_configuration_is_read_with_its_base(tmp_path):
    (tmp_path / "large.yaml").write_text("global-batch-size: 64\nmicro-batch-size: 2\ndata-streams: 8\n")
    path = tmp_path / "small.yaml"
    path.write_text("base: large.yaml\nmicro-batch-size: null\nglobal_batch_size: 16\n")
    flags = read_flags([], path.read_text(), path)
    assert Shape.from_flags(flags) == Shape(global_batch=16, data_streams=8) == by_the_real_reader(
        yaml.safe_dump(read_config(str(path)))
    )
    path.write_text("base: small.yaml")
    with pytest.raises(ValueError, match="its own base"):
        read_flags([], path.read_text(), path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"micro-batch-size": 2', "line 1 of the configuration, '\"micro-batch-size\": 2': write each flag once"),
        ("lr: 1\n{micro-batch-size: 2}", "line 2 of the configuration"),
        ("micro-batch-size: 2\nmicro_batch_size: 4", "line 2 of the configuration"),
        ("micro-batch-size:\n- 2", "micro-batch-size 'a list' is not a whole number from 1"),
        ("global-batch-size: 0x10", "global-batch-size '0x10' is not a whole number from 1, written as"),
    ],
)
def test_what_is_not_key_and_scalar_is_refused(text, message):
    with pytest.raises(ValueError) as refused:
        read_flags([], text)
    assert message in str(refused.value)


def test_a_quoted_number_is_a_number():
    assert Shape.from_flags(read_flags([], 'global-batch-size: "16"')).global_batch == 16
