import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_anyexperts.checks import doctor
from megatron_anyexperts.checks.doctor import FP8_CAPABILITY, HOW_TO_GET, STORAGE, Installation
from megatron_anyexperts.checks.driver import Driver
from megatron_anyexperts.training.arguments import UsageError

CONFIGS = Path(__file__).parents[3] / "pretrain" / "configs"
DEMO = str(CONFIGS / "demo.yaml")
BARE = Installation(torch="2.15.0", megatron="0.19.2")
FULL = Installation(
    torch="2.15.0",
    megatron="0.19.2",
    cuda="13.2",
    driver=Driver("580.95.05"),
    capability=(9, 0),
    gpus=("NVIDIA H100",),
    nccl="2.29",
    transformer_engine="2.11",
    apex="0.1",
    flash_attention="2.8",
    deep_ep="1.2",
    resiliency="0.5",
    storage=tuple(STORAGE),
)


def problems(found, *flags):
    return doctor.missing_for(doctor.parse_config(["--config", DEMO, *flags]), found)


def test_the_demo_needs_nothing():
    assert problems(BARE) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--transformer-impl", "transformer_engine"], "transformer-impl: local"),
        (["--distributed-backend", "nccl"], "use gloo"),
        (["--unset", "no-rope-fusion"], "no-rope-fusion: true"),
        (["--moe-grouped-gemm"], "moe-grouped-gemm needs Transformer Engine"),
        (["--attention-backend", "flash"], "flash-attn"),
        (["--async-save"], "async-save needs CUDA"),
        (["--data-path", "s3://bucket/blend.yaml"], "multi-storage-client[boto3]"),
    ],
)
def test_what_a_flag_needs_is_named_with_the_way_out(flags, message):
    (problem,) = problems(BARE, *flags)
    assert message in problem
    assert problems(FULL, *flags) == []


@pytest.mark.parametrize("recipe", FP8_CAPABILITY)
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_fp8_recipes_depend_on_the_gpu(recipe, capability):
    found = Installation(torch="", megatron="", capability=capability, transformer_engine="2.11", nccl="2")
    flags = ["--fp8-format", "hybrid", "--fp8-recipe", recipe, "--transformer-impl", "transformer_engine"]
    flags += ["--distributed-backend", "nccl"]
    missing = problems(found, *flags)
    assert len(missing) == (capability < FP8_CAPABILITY[recipe])
    assert all(f"fp8-recipe: {recipe}" in problem for problem in missing)


def test_fp8_needs_transformer_engines_modules():
    (problem,) = problems(FULL, "--fp8-format", "hybrid")
    assert "fp8 needs transformer-impl: transformer_engine" in problem


def test_report_tells_how_to_get_everything_that_is_missing():
    text = doctor.report(BARE)
    assert all(way in text for way in HOW_TO_GET.values())
    assert all(way in text for _, way in STORAGE.values())
    full = doctor.report(FULL)
    assert "missing" not in full
    assert "delayed, tensorwise, blockwise" in full and "mxfp8" not in full


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ([], 1),
        (["--expert-model-parallel-size", "2"], 2),
        (["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "4"], 8),
        (["--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"], 2),
        (["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2"], 4),
    ],
)
def test_least_ranks(flags, ranks):
    assert doctor.least_ranks(doctor.parse_config(["--config", DEMO, *flags])) == ranks


def test_unknown_keys_are_named(tmp_path):
    config = tmp_path / "wrong.yaml"
    config.write_text("hiden-size: 64\n")
    with pytest.raises(UsageError, match="hiden-size.*hidden-size"):
        doctor.parse_config(["--config", str(config)])


def test_command_accepts_the_demo():
    command = [sys.executable, "-W", "ignore", "-m", "megatron_anyexperts.doctor", "--config", DEMO]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "Transformer Engine" in result.stdout
    assert "can run here as a job of 1 rank(s)" in result.stdout


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--config", DEMO, "--anyexperts-k-min", "5", "--ranks", "1"], 1, "anyexperts_k_min=5"),
        (["--config", DEMO, "--ranks", "48"], 1, "use one of 1, 2, 4"),
        (["--config", DEMO, "--expert-model-parallel-size", "3"], 1, "as a job of 3 rank(s)"),
        (["--config", "nowhere.yaml"], 2, "cannot find the configuration nowhere.yaml"),
    ],
)
def test_command_says_why_a_configuration_cannot_run(capsys, flags, code, message):
    assert doctor.main(flags) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "mistake"),
    [
        ([], None),
        (["--anyexperts-k-min", "13"], "k_max=12"),
        (["--context-parallel-size", "2", "--micro-batch-size", "2"], "--micro-batch-size=2"),
        (["--context-parallel-size", "2", "--eval-micro-batch-size", "2"], "--eval-micro-batch-size=2"),
        (["--fp8-format", "e4m3"], "layernorm recompute for fp8"),
    ],
)
def test_command_names_missing_hardware_and_mistakes_at_once(capsys, monkeypatch, flags, mistake):
    monkeypatch.setattr(doctor, "inspect_installation", lambda: BARE)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as when run as a command
    assert doctor.main(["--config", str(CONFIGS / "ling_mini_2_0_anyexperts.yaml"), *flags]) == 1
    output = capsys.readouterr().err
    for key in ("transformer-impl", "distributed-backend", "moe-grouped-gemm", "rope fusion"):
        assert f"  - {key}" in output
    assert ("fp8-recipe: delayed needs" in output) == ("--fp8-format" in flags)
    assert ("as a job of 8 rank(s)" in output) == (mistake is not None)
    assert mistake is None or mistake in output


def test_training_commands_of_the_gpu_page_are_valid(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    page = (CONFIGS.parents[1] / "docs/gpu.md").read_text()
    proxy = re.search(r"^proxy=(\w+)$", page, re.MULTILINE)[1]
    commands = re.findall(r"`train (\d+) (\S+?)( --[^`]+)?`", page.replace("$proxy", proxy))
    assert len(commands) >= 10
    for ranks, name, flags in commands:
        args = doctor.parse_config(["--config", str(CONFIGS / f"{name}.yaml"), *flags.split()])
        assert doctor.refused_by_training(args, int(ranks), complete=True) is None, flags


def test_training_jobs_of_the_cluster_page_are_valid(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    page = (CONFIGS.parents[1] / "docs/cluster.md").read_text().replace("\\\n", " ")
    jobs = re.findall(r"^slurm/submit (?:pretrain|instruct_tune) .*NODES=(\d+).* -- (.*)$", page, re.MULTILINE)
    assert len(jobs) == 2
    for nodes, flags in jobs:
        args = doctor.parse_config(flags.split())
        assert doctor.refused_by_training(args, 8 * int(nodes), complete=True) is None, flags


def test_a_run_is_checked_by_its_directory(capsys, tmp_path):
    (tmp_path / "config.yaml").write_text("base: demo\nanyexperts-k-min: 5\n")
    assert doctor.main(["--run-dir", str(tmp_path)]) == 1
    assert "anyexperts_k_min=5" in capsys.readouterr().err


def test_command_without_configuration_only_reports(capsys):
    assert doctor.main([]) == 0
    assert capsys.readouterr().out == doctor.report(doctor.inspect_installation()) + "\n"


def test_the_table_of_what_is_replaced_is_printed(capsys):
    assert doctor.main(["--seams"]) == 0
    shown = capsys.readouterr().out
    assert doctor.main(["--seams", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) > 50 and all(row["name"] in shown and row["reason"] in shown for row in rows)
