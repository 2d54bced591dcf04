import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_anyexperts import cli
from megatron_anyexperts.analysis.charts import thin
from megatron_anyexperts.analysis.comparison import differences, names
from megatron_anyexperts.analysis.run_record import RunRecord
from megatron_anyexperts.survival import runlog
from tests.unit.analysis.made_run import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "first")
    make_run(folder / "below/second", steps=30, loss=5.0, lr=0.001, seed=7)
    (folder / "first/checkpoints/logs").mkdir(parents=True)
    (folder / "first/checkpoints/logs/events.jsonl").touch()  # a run inside a run is none
    return folder


def test_the_list_has_a_line_for_each_run(runs, capsys):
    assert cli.main(["runs", "list", str(runs)]) == 0
    heads, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["below/second", "first"]
    assert heads.split()[:4] == ["run", "state", "step", "of"]
    assert {"40", "100", "5.2000", "5.0000", "2.20", "1,040", "1"} <= set(lines[1].split())
    assert cli.main(["runs", "list", str(runs), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["first"]
    assert (row["step"], row["of"], row["held_out_loss"], row["restarts"]) == (40, 100, 5.0, 1)
    assert row["samples_lost"] == 4


def test_one_run_is_shown_with_what_lies_where(runs, capsys):
    assert cli.main(["runs", "show", str(runs / "first")]) == 0
    text = capsys.readouterr().out
    for words in ("iteration     40 of 100", "120 samples read, 4 lost, 1 in quarantine", "text 400", "held out at"):
        assert words in text
    assert "logs/metrics.jsonl" in text and f"tensorboard --logdir {runs}" not in text  # nothing was drawn
    assert cli.main(["runs", "show", str(runs / "first"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["targets"] == {"slots": 2.0, "real": 1.8} and shown["data"]["rows"] == 640


def test_runs_are_compared_at_the_same_steps_and_flag_by_flag(runs, tmp_path, capsys):
    given = ["runs", "compare", str(runs / "first"), str(runs / "below/second"), "--output", str(tmp_path / "out")]
    assert cli.main(given) == 0
    text = capsys.readouterr().out
    assert "loss at 30" in text and "held out at 20" in text
    assert [line.split() for line in text.splitlines()[-2:]] == [["lr", "0.003", "0.001"], ["seed", "-", "7"]]
    compared = json.loads((tmp_path / "out/comparison.json").read_text())
    assert {name: row["loss_at_common_step"] for name, row in compared["runs"].items()} == {
        "first": pytest.approx(5.4), "below/second": pytest.approx(4.4)
    }  # fmt: skip
    assert Image.open(tmp_path / "out/comparison.png").width > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "absent"], "absent is not a run: there is no logs/events.jsonl in it"),
        (["list", "absent"], "absent is not a folder"),
        (["compare", "absent", "./absent"], "1 run is given; name two or more"),
        (["report", "absent", "--output", "a.html"], "--output a.html: name a folder"),
    ],
)
def test_what_cannot_be_read_is_a_usage_error(words, message, capsys):
    assert cli.main(["runs", *words]) == 2
    assert message in capsys.readouterr().err


def test_an_empty_folder_is_answered(tmp_path, capsys):
    assert cli.main(["runs", "list", str(tmp_path)]) == 0
    assert "no run below" in capsys.readouterr().out


def test_records_that_are_no_figures_are_left_out(tmp_path):
    run = make_run(tmp_path, steps=10)
    for damage in ({"iteration": "x"}, {"iteration": 20, "loss": "NaN", "routing": 3}, {"iteration": 21, "loss": None}):
        runlog.append(run.metrics, damage)
    run.config.write_text("- a\n- b")
    run.expert_load.write_text('{"iteration": 1, "layers": {"x": 1}}')
    record = RunRecord.read(tmp_path)
    assert record.row()["loss"] is None and record.row()["step"] == 21
    assert record.config == {} and record.expert_load == (None, {})


configurations = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 2))


@given(st.dictionaries(st.sampled_from(["x", "y", "z"]), configurations, min_size=2))
def test_a_flag_is_listed_exactly_if_some_run_has_it_otherwise(configs):
    found = differences(configs)
    for flag in "abcd":
        values = [config.get(flag) for config in configs.values()]
        assert (flag in found) == (len(set(values)) > 1)
        if flag in found:
            assert [found[flag].get(run) for run in configs] == values


@given(st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=3), min_size=1, max_size=5, unique_by=tuple))
def test_names_tell_runs_apart(paths):
    folders = [Path("/runs").joinpath(*path) for path in paths]
    assert len(set(names(folders))) == len(folders)


@given(st.lists(st.floats(-10, 10), max_size=60), st.integers(1, 20))
def test_thinning_keeps_the_mean_and_the_end(ys, most):
    xs, means = thin(list(range(len(ys))), ys, most)
    assert len(xs) == len(means) == min(most, len(ys))
    if ys:
        assert xs[-1] == len(ys) - 1 and min(ys) - 1e-9 <= means.min() <= means.max() <= max(ys) + 1e-9
        if len(ys) % most == 0:
            assert means.mean() == pytest.approx(np.mean(ys), abs=1e-9)
