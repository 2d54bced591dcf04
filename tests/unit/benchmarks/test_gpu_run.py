"""The measurements of one GPU: order, time, records, and commands that a machine with everything would take."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import gpu_engine, gpu_run, gpu_steps
from benchmarks.gpu_machine import ROOT, Machine
from benchmarks.gpu_run import RESERVE, allowed, measure_all
from benchmarks.gpu_steps import FP8, NEEDS_GPU, NEEDS_TE, STEPS, Step, training
from megatron_anyexperts.checks import doctor

CPU = Machine("2.15.0", "13.2", "3.9.0", "0.19.2", None, None, None, "mcore")
BARE = Machine("2.15.0", "13.2", "3.9.0", "0.19.2", "NVIDIA H100 80GB HBM3", (9, 0), None, "mcore", "580.95.05")
FULL = Machine("2.15.0", "13.2", "3.9.0", "0.19.2", "NVIDIA H100 80GB HBM3", (9, 0), "2.20.2", "nvrx", "580.95.05")


def step(name: str, code: str, limit: float = 30.0, **fields) -> Step:
    """A step that runs a line of Python, with the folder of all steps as its argument."""
    fields.setdefault("figures", lambda work, output: {"said": output.split()[-1]})
    return Step(name, name, name, limit, lambda machine, work: [sys.executable, "-c", code, str(work)], **fields)


@given(limit=st.floats(1, 200), left=st.floats(-5, 500), later=st.integers(0, 20))
def test_a_step_takes_no_time_of_those_behind_it(limit, left, later):
    seconds = allowed(limit, left, later)
    assert seconds <= limit and seconds <= max(left, 0) or left < 0
    if left >= RESERVE * (later + 1):
        assert left - seconds >= RESERVE * later
    elif left > 0:
        assert seconds >= min(limit, left / (later + 1))


def test_whatever_a_step_does_the_others_run_and_all_is_recorded(tmp_path):
    steps = [
        step("lacking", "", lacks=lambda machine: NEEDS_GPU),
        step("broken", "print('before'); raise SystemExit('the reason')"),
        step("slow", "import time; print('waits', flush=True); time.sleep(60)", limit=6.0),
        step("mute", "print('no figures')", figures=lambda work, output: json.loads(output)),
        step("good", "print('fine')"),
    ]
    result = measure_all(steps, tmp_path, tmp_path / "gpu.json", 100.0, on_cpu=True)
    assert json.loads((tmp_path / "gpu.json").read_text()) == json.loads(json.dumps(result))
    lacking, broken, slow, mute, good = result["steps"]
    assert (lacking["state"], "seconds" in lacking) == (NEEDS_GPU, False)
    assert (broken["state"], broken["exit_code"], broken["last_lines"]) == ("failed", 1, ["before", "the reason"])
    assert (slow["state"], slow["exit_code"], slow["last_lines"]) == ("timed out", None, ["waits"])
    assert slow["seconds"] <= 6.5
    assert mute["state"] == "failed" and mute["last_lines"][-1].startswith("no figures: JSONDecodeError")
    assert (good["state"], good["figures"]) == ("ran", {"said": "fine"})
    assert result["machine"]["gpu"] is None and good["command"].startswith("python -c print('fine') WORK")


def test_the_budget_ends_what_runs_and_skips_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "RESERVE", 0.0)
    monkeypatch.setattr(Machine, "look", lambda variables: CPU)  # starting torch takes as long as the budget
    steps = [step(name, "import time; print('x', flush=True); time.sleep(60)") for name in ("first", "second")]
    started = time.monotonic()
    first, second = measure_all(steps, tmp_path, tmp_path / "gpu.json", 8.0, on_cpu=True)["steps"]
    assert time.monotonic() - started < 9
    assert (first["state"], second["state"]) == ("timed out", "no time left")


def test_processes_that_a_step_leaves_behind_are_ended(tmp_path):
    child = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    log = tmp_path / "log"
    assert gpu_run.run([sys.executable, "-c", child], 20.0, log, dict(os.environ))[0] == 0
    left = Path(f"/proc/{log.read_text().strip()}/stat")
    for _ in range(100):
        if not left.exists() or left.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("it is still there")


def test_what_a_machine_lacks_is_named():
    def states(machine: Machine) -> dict[str, str]:
        return {each.name: each.lacks(machine) for each in STEPS if each.lacks(machine)}

    assert set(states(CPU).values()) == {NEEDS_GPU}
    on_cpu = [each.name for each in STEPS if each.name not in states(CPU)]
    assert on_cpu == ["gpu_check", "moe_layer", "corpus", "bf16", "evaluate", "generate", "kernels"]
    assert states(BARE) == {**{f"fp8_{recipe}": NEEDS_TE for recipe in FP8}, "attention": NEEDS_TE}
    assert states(FULL) == {"fp8_mxfp8": "needs compute capability 10.0"}
    assert FP8 == doctor.FP8_CAPABILITY


@pytest.mark.parametrize("machine", [BARE, FULL], ids=["without TE", "with TE"])
def test_the_trainings_would_start_on_a_gpu(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for each in STEPS:
        words = each.command(machine, tmp_path)
        if "pretrain/pretrain_multimodal.py" in words and each.lacks(machine) is None:
            args = doctor.parse_config(words[words.index("--config") :])
            assert doctor.refused_by_training(args, 1, complete=True) is None, words
            assert args.transformer_impl == ("local" if machine is BARE else "transformer_engine")


def test_figures_of_a_training_are_read_from_what_it_prints():
    line = " iteration {0}/ 4 | lm loss: 9 | mtp_1 loss: 9 | loss: {1} | tokens_per_s: {2} | mfu: {3} | all: slots\n"
    text = " iteration 1/ 4 | loss: 6.25 | all: slots\n"
    text += "".join(line.format(*row) for row in ((2, 6.0, 10, 0.1), (3, 5.5, "2e+04", 0.3), (4, 5.25, 22000, 0.34)))
    text += "[Rank 0] memory (MB) | allocated: 3.0 | max allocated: 2048.00 | reserved: 0.00\n"
    text += "    save-checkpoint ....................: (1311.37, 1500.00)\n"
    assert training(text) == {
        "steps": 4, "first_loss": 6.25, "last_loss": 5.25, "tokens_per_s": 21000.0, "mfu": pytest.approx(0.32),
        "peak_gib": 2.0, "saves": 1, "longest_save_stall_s": 1.5,
    }  # fmt: skip
    with pytest.raises(IndexError):
        training("it never began")


def test_what_is_compiled_comes_last_and_torch_stays_as_it_is():
    lock = (ROOT / "requirements-fp8.lock").read_text()
    wheels, source = gpu_engine.parts(lock, {"torch", "numpy"})
    assert "\ntorch==" not in wheels and not wheels.startswith("torch==")
    assert "transformer-engine-cu13==" in wheels and "ninja==" in wheels
    assert source.startswith("transformer-engine-torch==") and source.count("==") == 1
    assert wheels.count("--hash") + source.count("--hash") + gpu_engine.parts(lock, set())[0].count("--hash") > 100
    every = {gpu_engine.canonical(line.split("==")[0]) for line in lock.splitlines() if "==" in line and line[0] != " "}
    assert gpu_engine.parts(lock, every) == ("", "")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_on_a_cpu_all_that_needs_no_gpu_truly_runs(tmp_path):
    output = tmp_path / "gpu.json"
    command = [str(ROOT / "benchmarks/gpu.sh"), "--cpu", "--output", str(output), "--minutes", "30"]
    variables = {"PYTHON": sys.executable}
    code, _ = gpu_run.run(command, 1700.0, tmp_path / "log", os.environ | variables)
    assert code == 0, (tmp_path / "log").read_text()[-3000:]
    records = {record["name"]: record for record in json.loads(output.read_text())["steps"]}
    assert list(records) == [each.name for each in STEPS]
    assert {name for name, record in records.items() if record["state"] == "ran"} == {
        each.name for each in STEPS if each.lacks(CPU) is None
    }
    assert records["bf16"]["figures"]["steps"] == 8 and records["bf16"]["figures"]["saves"] == 1
    assert all(row["fine"] for row in records["kernels"]["figures"])
    assert records["generate"]["figures"]["tokens"] == 8
    assert gpu_steps.last_json(tmp_path, '{"a": 1}\nlater') == {"a": 1}
