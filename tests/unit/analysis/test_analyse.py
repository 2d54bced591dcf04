"""`anyexperts analyse` reads traces of any layout and says what is in them, and what is not."""

import json
import shutil

import numpy as np
import pytest
from markupsafe import escape

from megatron_anyexperts.analysis.report import PICTURES, report
from megatron_anyexperts.analysis.routing.table import NoTrace, read_trace, shared_tokens
from megatron_anyexperts.analysis.run_record import RunRecord
from megatron_anyexperts.commands.analyse import main
from megatron_anyexperts.survival.run_directory import Run
from tests.unit.analysis.made_run import make_run
from tests.unit.analysis.planted import (
    SAMPLE,
    SAMPLES,
    TASK,
    TOKENS,
    collapsed,
    specialists,
    without_preference,
    write_trace,
)

TWO = np.concatenate((specialists(), without_preference()))


def test_a_trace_comes_back_as_it_was_written(tmp_path):
    table = read_trace(write_trace(tmp_path, TWO))
    assert table.layers == (2, 3) and table.left_out == 0 and table.of_tokens == SAMPLES * TOKENS
    order = np.lexsort((table.place_N, np.array([int(name.split("s")[1]) for name in table.samples])[table.sample_N]))
    assert (table.active_LNE[:, order] == TWO).all()
    assert (table.top_LN[:, order] == TWO.argmax(2)).all()
    assert (table.slots_LN == 3).all() and (table.real_LN == 2).all()
    assert table.tasks[table.sample_N[order]].tolist() == [f"t{task}" for task in TASK[SAMPLE]]


def test_a_token_that_lacks_a_layer_is_left_out_and_counted(tmp_path):
    write_trace(tmp_path, TWO)
    other = write_trace(tmp_path / "other", without_preference(), sequence=SAMPLE + SAMPLES)
    shutil.copy(next((other / "tokens").iterdir()), tmp_path / "tokens/step-00000010-rank0007.parquet")
    table = read_trace(tmp_path)
    assert (len(table.token_N), table.left_out, table.of_tokens) == (SAMPLES * TOKENS, SAMPLES * TOKENS, 2000)


def test_of_a_large_trace_whole_samples_are_drawn(tmp_path):
    table = read_trace(write_trace(tmp_path, TWO), most_tokens=100)
    assert np.bincount(table.sample_N).tolist() == [TOKENS] * 4 and table.of_tokens == SAMPLES * TOKENS


def test_checkpoints_are_compared_on_the_tokens_that_they_share(tmp_path):
    first, second = (
        read_trace(write_trace(tmp_path / name, TWO, step)) for name, step in (("a", 10), ("b", 20))
    )
    chosen = np.random.default_rng(0).permutation(SAMPLES * TOKENS)[:300]
    one, other = shared_tokens([first.take(chosen), second])
    assert len(one.token_N) == len(other.token_N) == 300
    assert (one.active_LNE == other.active_LNE).all() and (one.place_N == other.place_N).all()
    with pytest.raises(NoTrace, match="other mixture layers"):
        shared_tokens([first, read_trace(write_trace(tmp_path / "c", collapsed()))])


def figures(capsys, *words) -> dict:
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """With a trace of answers, and one of training at two steps."""
    run = make_run(tmp_path_factory.mktemp("runs") / "run")
    write_trace(run.traces / "answers", TWO)
    for step, active in ((10, without_preference()), (20, collapsed())):
        write_trace(run.traces / "training", active, step)
    return run


def test_a_run_is_analysed_into_tables_and_pictures_of_its_report(run, capsys):
    assert main([str(run.root)]) == 0
    said = capsys.readouterr()
    assert "answers, step 10: 1000 tokens; samples by task: t0 10, t1 10, t2 10, t3 10" in said.err
    assert "signatures: cosine similarity" in said.out and "layer 3" in said.out
    assert "left out: classes of tokens" in said.out
    names = {"signatures.png", "specialisation.png", "modalities.png", "coactivation.png", "load_over_time.png"}
    assert {path.name for path in (run.root / "pictures").iterdir()} == names
    shown = report(RunRecord.read(run.root), now=0.0)
    assert all(str(escape(PICTURES[name])) in shown for name in names)


def test_two_checkpoints_give_saturation_and_fluctuation(tmp_path, capsys):
    one = write_trace(tmp_path / "one", specialists())
    two = write_trace(tmp_path / "two", specialists(), step=20)
    found = figures(capsys, one, two)["figures"]
    [saturation], [fluctuation] = found["saturation"].values(), found["fluctuation from here on"].values()
    assert saturation["value"] == 1 and fluctuation["value"] == 0
    assert saturation["null"] == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("{run}", "--step", "3"), "has no step 3; it has 10"),
        (("{run}/logs",), "holds no routing trace"),
        (("{run}", "--most-tokens", "0"), "--most-tokens 0 is below 1"),
    ],
)
def test_what_cannot_be_analysed_is_refused(run, capsys, words, why):
    assert main([word.format(run=run.root) for word in words]) == 2
    assert why in capsys.readouterr().err
