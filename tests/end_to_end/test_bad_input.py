"""What a user gets wrong ends in one clear message and a non-zero exit code."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.run_directory import Run
from tests import deadly
from tests.end_to_end.launch import ENTRY, ROOT, TINY, pretrain, run_ranks_fresh


def message(result) -> str:
    """The lines of the output that explain the failure."""
    assert "Traceback" not in result.output, result.output[-3000:]
    lines = [line for line in result.output.splitlines() if line.startswith("error")]
    assert lines, result.output[-3000:]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "flags, expected",
    [
        (("--anyexperts-k-min", "4"), ["k_min=4", "k_max=3"]),
        (("--num-expert", "4"), ["--num-expert", "num-experts"]),
        (("--unset", "no-such-key"), ["no-such-key"]),
        (("--data-streams", "3"), ["global_batch_size=4", "data_streams=3"]),
        (("--async-save",), ["--async-save"]),
        (("--data-streams", "4", "--train-iters", "4", "--lr-warmup-iters", "5"), ["--lr-warmup-iters 5", "iters 4"]),
        (("--anyexperts-rho-max", "1.5"), ["rho_max", "1.5"]),
        (("--data-path", "README.md", "LICENSE"), ["--data-path", "one Energon blend"]),
        (("--bf16", "--unset", "use-distributed-optimizer"), ["--bf16", "use-distributed-optimizer"]),
        (("--distrib-optim-fully-reshardable-mem-efficient",), ["mem-efficient", "leave it out"]),
    ],
    ids=[
        "K_min above K_max",
        "unknown flag",
        "unset nothing",
        "batch and streams",
        "async save",
        "warm-up longer than the run",
        "share above 1",
        "two blends",
        "bf16 and the other optimizer",
        "Megatron's gathered save",
    ],
)
def test_wrong_flags(corpus, tmp_path, flags, expected):
    text = message(pretrain(corpus, tmp_path / "run", *flags, succeed=False))
    assert all(word in text for word in expected), text


def test_ranks_that_cannot_share_the_streams(corpus, tmp_path):
    text = message(pretrain(corpus, tmp_path / "run", "--data-streams", "4", ranks=3, succeed=False))
    assert text == "error: 3 ranks, dp_size=3, does not divide data_streams=4; use one of 1, 2, 4 ranks"


def test_torchrun_ends_with_the_reason(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(ENTRY)]
    words = ["--config", str(TINY), "--run-dir", str(tmp_path / "run"), "--num-expert", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run([*command, *words], env=environment, cwd=ROOT, capture_output=True, text=True).stderr
    report = output[output.index("ChildFailedError") :]
    assert "error: unknown flag --num-expert; did you mean num-experts" in report
    assert not (tmp_path / "run").exists()


def test_unknown_configuration_key(corpus, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(TINY.read_text().replace("hidden-size: 32", "hiden-size: 32", 1))
    text = message(pretrain(corpus, tmp_path / "run", config=config, succeed=False))
    assert "hiden-size" in text and "hidden-size" in text


def test_nothing_held_out(corpus, tmp_path):
    """Before anything starts: few samples may all fall to one side."""
    blend = yaml.safe_load((corpus / "shards/blend.yaml").read_text())
    del blend["splits"]["val"]
    # Beside the original, so that its paths hold.
    path = corpus / "shards/nothing-held-out.yaml"
    path.write_text(yaml.safe_dump(blend))
    text = message(pretrain(corpus, tmp_path / "run", "--data-path", str(path), succeed=False))
    assert "no val split" in text and "--eval-iters 0" in text and "validation_fraction" in text


def test_a_mixture_schedule_that_does_not_fit(corpus, tmp_path):
    path = tmp_path / "schedule.yaml"
    path.write_text("stages: [{at_step: 2, weights: {txet: 1.0}}]")
    text = message(pretrain(corpus, tmp_path / "run", "--data-mixture-schedule", str(path), succeed=False))
    assert "'txet' is no dataset of the blend; it has audio_text, image_text, text" in text
    path.write_text("stages: [{at_step: 5, weights: {text: 1.0}}, {at_step: 6, weights: {audio_text: 1.0}}]")
    text = message(pretrain(corpus, tmp_path / "run", "--data-mixture-schedule", str(path), succeed=False))
    assert "mixture stage 3 of 3 begins at row 24" in text and "training ends with row 24" in text


def test_missing_data(corpus, tmp_path):
    text = message(pretrain(tmp_path / "nowhere", tmp_path / "run", succeed=False))
    assert "nowhere" in text and "build_shards" in text


def test_expert_parallelism_that_does_not_divide_the_experts(corpus, tmp_path):
    flags = ("--num-experts", "3", "--expert-model-parallel-size", "2")
    text = message(pretrain(corpus, tmp_path / "run", *flags, ranks=2, succeed=False))
    assert "3" in text and "2" in text and "expert" in text


@pytest.fixture
def truncated(corpus, tmp_path):
    """The corpus with every text shard cut off in the middle."""
    shutil.copytree(corpus, tmp_path / "corpus")
    for shard in (tmp_path / "corpus/shards/text").glob("shard-*.tar"):
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 3])
    return tmp_path / "corpus"


def test_samples_that_are_cut_or_kill_their_decoder_are_listed_and_training_goes_on(truncated, tmp_path, monkeypatch):
    shard = truncated / "shards/image_text/shard-000.tar"
    *pictures, rest = shard.read_bytes().split(b"\xff\xd9")  # the end marker
    marked = [part[: -len(deadly.MARK)] + deadly.MARK for part in pictures]
    shard.write_bytes(b"\xff\xd9".join([*marked, rest]))
    (tmp_path / "sitecustomize.py").write_text(deadly.SITECUSTOMIZE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    result = pretrain(truncated, tmp_path / "run", run_ranks=run_ranks_fresh)
    assert "lost sample shard-" in result.output
    assert "lost sample image_text/" in result.output and "decoding kills the process: signal 11" in result.output
    assert 6 in result.losses
    lines = runlog.read_metrics(Run(tmp_path / "run"))
    assert sum(line["samples_lost"] for line in lines) > 0
    listed = [json.loads(line) for line in Run(tmp_path / "run").quarantine.read_text().splitlines()]
    assert listed and all(line["key"].startswith("image_text/") and line["stage"] == "decode" for line in listed)


def test_a_truncated_shard_stops_the_run_when_the_budget_is_spent(truncated, tmp_path):
    text = message(pretrain(truncated, tmp_path / "run", "--data-error-budget", "0", succeed=False))
    assert "data_error_budget=0" in text
