"""Studies: a declaration, a ledger that survives, tables that are its arithmetic."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts import cli
from megatron_anyexperts.studies import ledger
from megatron_anyexperts.studies.declaration import Run, Study, StudyError
from megatron_anyexperts.studies.report import BEGIN, END, mean_and_error, page, paired, value, with_tables

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """\
import json, os, sys, time, yaml
config = yaml.safe_load(open(sys.argv[1]))
open(sys.argv[2], "a").write(f"{config['speed']} {config['seed']}\\n")
while os.path.exists(sys.argv[3]) and config["seed"] == 2:
    time.sleep(0.05)
print("a line of no importance")
print(json.dumps({"loss": config["speed"] * 10 + config["seed"], "layers": {"1": {"a": 1}, "2": {"a": 3}}}))
"""


def declared(folder: Path, **changed) -> Path:
    """A study of four runs of a tiny program, which notes each start in `starts` and waits while `wait` is there."""
    content = {
        "question": "how fast?", "criterion": "faster", "config": "none", "inputs": {"here": "a folder"},
        "flags": {"note": "{here}/x"}, "settings": {"slow": {"speed": 1}, "fast": {"speed": 3}}, "seeds": [1, 2],
        "steps": {"measure": {"command": "{python} {here}/program.py {config} {here}/starts {here}/wait"}},
        "figures": {"loss": {"path": "measure.loss", "digits": 1}, "mean": {"path": "measure.layers.*.a"}},
        "compare_with": "slow",
    }  # fmt: skip
    (folder / "program.py").write_text(PROGRAM)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content | changed, sort_keys=False))
    return path


def run_words(path: Path) -> list[str]:
    return ["study", "run", str(path), "--input", f"here={path.parent}", "--work", str(path.parent / "work")]


def test_a_study_that_was_killed_goes_on_where_it_was(tmp_path):
    path = declared(tmp_path)
    (tmp_path / "wait").touch()
    starts = tmp_path / "starts"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "megatron_anyexperts", *run_words(path)], env=environment)
    while not starts.exists() or starts.read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    file = tmp_path / "study/ledger.jsonl"
    with file.open("a") as unfinished:
        unfinished.write('{"setting": "slow", "se')  # a line that a killed runner did not finish
    (tmp_path / "wait").unlink()
    assert cli.main([*run_words(path), "--setting", "slow"]) == 0
    assert starts.read_text().split("\n")[:-1] == ["1 1", "3 1", "1 2", "1 2"]
    assert cli.main(run_words(path)) == 0
    assert starts.read_text().split("\n")[:-1] == ["1 1", "3 1", "1 2", "1 2", "3 2"]
    records, notes = ledger.read(file)
    assert len(records) == 4 and ["line 3" in note for note in notes] == [True]
    assert {(one["setting"], one["seed"]): one["results"]["measure"]["loss"] for one in records} == {
        ("slow", 1): 11, ("fast", 1): 31, ("slow", 2): 12, ("fast", 2): 32,
    }  # fmt: skip
    assert cli.main(run_words(path)) == 0
    assert starts.read_text().count("\n") == 5


def test_runs_of_another_declaration_do_not_count(tmp_path, capsys):
    assert cli.main(run_words(declared(tmp_path, seeds=[1]))) == 0
    path = declared(tmp_path, settings={"slow": {"speed": 1}, "fast": {"speed": 4}})
    capsys.readouterr()
    assert cli.main(["study", "status", str(path)]) == 0
    told = capsys.readouterr().out
    assert "1 of 4 runs; 1 lines of other declarations" in told
    lines = [line.split() for line in told.splitlines()[1:3]]
    assert lines == [["slow", "done", "missing"], ["fast", "missing", "missing"]]


def test_the_page_holds_means_errors_and_paired_differences(tmp_path):
    path = declared(tmp_path)
    for setting, losses in {"slow": (11, 13), "fast": (31, 35)}.items():
        for seed, loss in enumerate(losses, 1):
            identity = Study.read(path).identity(Run(setting, seed))
            results = {"measure": {"loss": loss, "layers": {"1": {"a": 1}, "2": {"a": 3}}}}
            about = {"commit": "c", "seconds": 1, "results": results}
            ledger.append(tmp_path / "study/ledger.jsonl", identity | about)
    text = page(Study.read(path), path, tmp_path / "study/ledger.jsonl")
    assert "|  | slow | fast |\n| --- | --- | --- |\n| seeds | 2 | 2 |\n| loss | 12.0 ± 1.0 | 33.0 ± 2.0 |\n" in text
    assert "|  | fast |\n| --- | --- |\n| seeds | 2 |\n| loss | +21.0 ± 1.0 |\n| mean | +0.00 ± 0.00 |\n" in text
    assert "4 of 4 declared runs" in text
    whole = f"above\n{BEGIN}\nold\n{END}\nbelow"
    assert with_tables(whole, text) == f"above\n{BEGIN}\n{text}\n{END}\nbelow"
    ledger.append(tmp_path / "study/ledger.jsonl", Study.read(path).identity(Run("slow", 1)))
    with pytest.raises(StudyError, match="twice"):
        page(Study.read(path), path, tmp_path / "study/ledger.jsonl")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"compare_with": "quick"}, "quick"),
        ({"settings": {"a b": {}, "a-b": {}}, "compare_with": "a b"}, "several runs would be in a-b-1"),
        ({"steps": {"measure": {"command": "{pyton} x"}}}, "'pyton'"),
        ({"sedes": [1]}, "sedes"),
    ],
)
def test_what_does_not_hold_together_is_refused(tmp_path, changed, said):
    with pytest.raises(StudyError, match=said):
        Study.read(declared(tmp_path, **changed))


def test_a_missing_input_and_a_failed_step_are_named(tmp_path, capsys):
    path = declared(tmp_path)
    assert cli.main(["study", "run", str(path), "--work", str(tmp_path / "work")]) == 2
    assert "give here=PATH (a folder)" in capsys.readouterr().err
    assert cli.main([*run_words(path), "--setting", "quick"]) == 2
    assert "no setting quick; there are slow, fast" in capsys.readouterr().err
    path = declared(tmp_path, steps={"measure": {"command": "{python} {here}/none.py"}})
    assert cli.main(run_words(path)) == 2
    said = capsys.readouterr().err
    assert "slow, seed 1: measure ended with 2" in said
    assert "none.py" in Path(said.split("log: ")[1].strip()).read_text()


@given(st.dictionaries(st.integers(0, 5), st.floats(-9, 9)), st.dictionaries(st.integers(0, 5), st.floats(-9, 9)))
def test_differences_are_of_seeds_that_both_have(ours, base):
    differences = paired(ours, base)
    assert len(differences) == len(set(ours) & set(base))
    if differences:
        both = set(ours) & set(base)
        expected = math.fsum(ours[seed] - base[seed] for seed in both) / len(both)
        assert mean_and_error(differences)[0] == pytest.approx(expected, abs=1e-9)


def test_a_figure_that_a_run_lacks_is_not_a_number():
    assert math.isnan(value({"a": {}}, "a.b")) and math.isnan(value({"a": {}}, "a.*.b"))
    assert value(json.loads('{"a": {"x": {"b": 1}, "y": {"b": 2}}}'), "a.*.b") == 1.5


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_page_of_a_study_is_what_its_ledger_says(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # pages name files as from there
    text = (ROOT / f"docs/{path.stem}.md").read_text()
    path = path.relative_to(ROOT)
    generated = page(Study.read(path), path, path.with_suffix("") / "ledger.jsonl")
    assert with_tables(text, generated) == text, f"run: anyexperts study report {path} --page docs/{path.stem}.md"
