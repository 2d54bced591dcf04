"""A run goes on with the settings of its checkpoint, or says which ones are others."""

import re
import shutil
from pathlib import Path

import pytest

from megatron_anyexperts.survival import runlog
from tests.end_to_end.launch import ROOT, Finished, pretrain

CONSTANT = ("--lr-decay-style", "constant")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Path:
    """The directory of a run that ended after its three iterations, with checkpoints of the last two."""
    folder = tmp_path_factory.mktemp("settings") / "finished"
    pretrain(corpus, folder, *CONSTANT, "--train-iters", "3", "--save-interval", "2")
    return folder


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """A copy of the finished run to go on with."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def rates(result: Finished) -> dict[int, float]:
    """Learning rate by iteration of the last start."""
    last = result.log.rsplit("end of arguments", 1)[1]
    found = re.findall(r"iteration +(\d+)/.*? learning rate: ([0-9.E+-]+)", last)
    return {int(iteration): float(rate) for iteration, rate in found}


def loads(result: Finished) -> list[dict]:
    return [event for event in runlog.read_events(result.run) if event["event"] == "load"]


def test_a_longer_run_is_one_flag_away_and_goes_on_as_if_it_had_always_been_longer(corpus, run_dir, tmp_path):
    refused = pretrain(corpus, run_dir, *CONSTANT, "--train-iters", "6", succeed=False)
    assert refused.codes == [2]
    assert "--train-iters 3 in the checkpoint, 6 now (add --change-schedule" in refused.output
    # What the newest checkpoint says is damaged: the one before is compared instead.
    settings = run_dir / "checkpoints/iter_0000003/identity.json"
    settings.write_text(settings.read_text()[:100])
    longer = pretrain(corpus, run_dir, *CONSTANT, "--train-iters", "6", "--change-schedule")
    assert longer.losses == pretrain(corpus, tmp_path / "whole", *CONSTANT, "--train-iters", "6").losses
    assert [(event["iteration"], event["changed"]) for event in loads(longer)] == [(2, {"train_iters": [3, 6]})]


def test_settings_that_do_not_fit_are_all_named_by_flag_before_anything_starts(corpus, run_dir):
    flags = (
        *("--hidden-size", "48", "--rotary-base", "500", "--norm-epsilon", "1e-2", "--data-packing-buffer", "6"),
        *("--unset", "moe-router-enable-expert-bias", "--lr", "1e-4", "--anyexperts-k-max", "4"),
        *("--freeze-vision-encoder", "--vision-patch-size", "16"),
    )
    result = pretrain(corpus, run_dir, *CONSTANT, "--train-iters", "3", *flags, succeed=False)
    assert result.codes == [2]
    assert "Traceback" not in result.output
    for said in (
        "--hidden-size 32 in the checkpoint, 48 now",
        "--vision-patch-size 14 in the checkpoint, 16 now",
        "--anyexperts-virtual-experts 1 in the checkpoint, 2 now",
        "--rotary-base 10000 in the checkpoint, 500 now",
        "--norm-epsilon 1e-05 in the checkpoint, 0.01 now",
        "--moe-router-enable-expert-bias given in the checkpoint, not given now",
        "--data-packing-buffer 8 in the checkpoint, 6 now",
        "--freeze-vision-encoder not given in the checkpoint, given now",
        "--lr 0.005 in the checkpoint, 0.0001 now",
        "--accept-change norm-epsilon moe-router-enable-expert-bias rotary-base",
        "--change-schedule",
    ):
        assert said in result.output, said
    assert "--anyexperts-k-max" not in result.output.split("error:")[1]


def test_other_rates_batches_and_dials_act_and_are_reported(corpus, run_dir, tmp_path):
    moved = shutil.copytree(corpus / "tokenizer", tmp_path / "moved")
    flags = (
        *("--lr", "1e-3", "--lr-scale-vision-encoder", "0.1", "--lr-decay-style", "linear", "--train-iters", "5"),
        *("--global-batch-size", "8", "--change-schedule", "--rotary-base", "500", "--accept-change", "rotary-base"),
        *("--anyexperts-target-slots", "1.9", "--tokenizer-model", str(moved)),
    )
    result = pretrain(corpus, run_dir, *flags)
    line = next(line for line in result.output.splitlines() if line.startswith("resuming"))
    changed = {
        "anyexperts_target_slots": [2.0, 1.9], "global_batch_size": [4, 8], "lr": [0.005, 0.001],
        "lr_decay_style": ["constant", "linear"], "lr_scale_vision_encoder": [1.0, 0.1], "rotary_base": [10000, 500],
        "train_iters": [3, 5],
    }  # fmt: skip
    assert loads(result)[-1]["changed"] == changed
    assert "--anyexperts-target-slots 2.0 in the checkpoint, 1.9 now (dials)" in line
    # Logged is the rate after an iteration: linear from 1e-3 after the first to 0 after the fifth.
    assert rates(result) == pytest.approx({4: 2.5e-4, 5: 0.0})
    assert runlog.read_metrics(result.run)[-1]["consumed_samples"] == 3 * 4 + 2 * 8


def test_tools_compare_as_well(corpus, finished):
    flags = ("--rotary-base", "500", "--prompt", "a small red boat")
    refused = pretrain(corpus, finished, *flags, entry=ROOT / "pretrain/generate.py", succeed=False)
    assert "--rotary-base 10000 in the checkpoint, 500 now" in refused.output
    assert "--lr-decay-style" not in refused.output.split("error:")[1]
