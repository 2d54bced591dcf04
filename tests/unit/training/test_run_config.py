import re

import pytest
import yaml

from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training import run_config
from megatron_anyexperts.training.arguments import merge, switches

WORDS = [
    *("--config", "demo", "--lr", "1e-4", "--min-lr=0.5", "--unset", "log-sample-keys", "--hidden-size", "96"),
    *("--recompute-modules", "moe", "layernorm", "--data-path", "shards/blend.yaml", "--finetune"),
    *("--expert-model-parallel-size", "2", "--change-schedule"),
]


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run").create()
    run_config.write(run, merge([*WORDS, "--run-dir", str(run.root)]), switches())
    return run


def options(words: list[str]) -> dict:
    found = run_config.as_mapping(words, switches())
    return {name: value for name, value in found.items() if name != "run-dir"}


def test_a_run_alone_gives_its_command_again(run, capsys):
    again = options(merge(["--run-dir", str(run.root)]))
    expected = options(merge(WORDS))
    assert again.pop("data-path").endswith("/shards/blend.yaml")
    del expected["data-path"], expected["change-schedule"]
    assert again == expected
    assert again["lr"] == "1e-4" and again["min-lr"] == 0.5 and again["recompute-modules"] == ["moe", "layernorm"]
    assert "flags that the command line does not give are those of" in capsys.readouterr().err
    # The command line still wins, and another configuration counts instead of the run's.
    assert options(merge(["--run-dir", str(run.root), "--lr", "3"]))["lr"] == 3
    assert merge(["--num-experts", "4", "--run-dir", str(run.root)])[:2] == ["--num-experts", "4"]
    assert options(merge(["--run-dir", str(run.root), "--config", "demo"])) == options(merge(["--config", "demo"]))


def test_a_tool_takes_over_what_is_not_of_training_alone(run):
    taken = options(merge(["--run-dir", str(run.root)], drop=run_config.TRAINING_ONLY))
    assert "finetune" not in taken and "expert-model-parallel-size" not in taken
    assert taken["hidden-size"] == 96


def test_the_file_says_what_carried_it_out(run):
    text = run.config.read_text()
    for line in ("started as: .*--lr 1e-4", "megatron-core 0.19", "torch 2", "python 3", "commit [0-9a-f]{40}"):
        assert re.search(f"^# {line}", text, re.M), text
    assert yaml.safe_load(text)["hidden-size"] == 96


def test_a_run_without_the_file_is_no_error(tmp_path):
    assert merge(["--run-dir", str(tmp_path), "--lr", "1"]) == ["--run-dir", str(tmp_path), "--lr", "1"]
