import argparse
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megatron_anyexperts.training import arguments
from megatron_anyexperts.training.arguments import UsageError, _refuse, config_to_argv, merge
from megatron_anyexperts.training.config_files import read_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def flags():
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden-size", type=int)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--no-fusion", dest="fusion", action="store_false")
    parser.add_argument("--languages", nargs="+")
    return {option: action for action in parser._actions for option in action.option_strings}


def test_every_kind_of_value_becomes_words(flags):
    config = {"hidden-size": 32, "bf16": True, "no-fusion": False, "languages": ["en", "fr"]}
    assert config_to_argv(config, set(), flags) == ["--hidden-size", "32", "--bf16", "--languages", "en", "fr"]


def test_the_command_line_wins(flags):
    assert config_to_argv({"hidden-size": 32, "bf16": True}, {"hidden_size"}, flags) == ["--bf16"]


def test_an_unknown_key_suggests_the_nearest(flags):
    with pytest.raises(UsageError, match="hiden-size.*hidden-size"):
        config_to_argv({"hiden-size": 32}, set(), flags)


def test_a_switch_takes_no_number(flags):
    with pytest.raises(UsageError, match="bf16.*true or false, not 3"):
        config_to_argv({"bf16": 3}, set(), flags)


@pytest.mark.parametrize("text", ["- a list", "nested: {a: 1}", "a: [", "plain"])
def test_a_file_that_is_no_flat_mapping_is_refused(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=str(path)):
        read_config(str(path))


def test_underscores_and_dashes_are_the_same(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"hidden_size": 1, "bf16": True}))
    assert read_config(str(path)) == {"hidden-size": 1, "bf16": True}


def test_a_missing_file_is_named():
    with pytest.raises(UsageError, match="no/such.yaml"):
        read_config("no/such.yaml")


def test_a_batch_size_beside_a_schedule_is_refused_with_the_way_out():
    args = SimpleNamespace(
        num_experts=4, expert_model_parallel_size=1, step_batch_size_schedule="0:2 1K:4", global_batch_size=4
    )
    with pytest.raises(UsageError, match="--global-batch-size=4 .*--unset global-batch-size"):
        _refuse(args)


def test_states_that_training_changes_are_not_written_behind_its_back(monkeypatch):
    monkeypatch.setattr(arguments, "has_cuda", lambda: True)
    sizes = {"num_experts": 4, "expert_model_parallel_size": 1, "step_batch_size_schedule": None}
    args = SimpleNamespace(**sizes, async_save=True, use_persistent_ckpt_worker=True, optimizer_cpu_offload=True)
    with pytest.raises(UsageError, match="--async-save with --optimizer-cpu-offload.*leave one out"):
        _refuse(args)


def test_the_documented_changes_of_a_schedule_are_flags(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = Path("docs/survival.md").read_text().split("## Extending a run")[1].split("\n## ")[0]
    [command] = re.findall(r"```\n(.*?)```", page, re.DOTALL)
    words = shlex.split(command.replace("\\\n", " ").split("pretrain_multimodal.py")[1])
    assert merge(words)[-3:] == ["--train-iters", "480", "--change-schedule"]
    others = [shlex.split(each) for each in re.findall(r"`(--[^`]* --change-schedule)`", page)]
    assert len(others) == 2
    for flags in others:
        assert merge([*words[:2], *flags])[-len(flags) :] == flags
