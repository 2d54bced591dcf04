"""What was trained or imported without Transformer Engine goes on over it: in pretraining, and in FP8 tuning."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from megatron_anyexperts.survival import runlog
from tests.end_to_end.dumping_pretrain import live_state
from tests.end_to_end.launch import DUMPING, ROOT, pretrain
from tests.end_to_end.proxies import INSTEAD, WITHOUT_CUDA
from tests.end_to_end.test_configurations import FOUR
from tests.end_to_end.test_instruct import chats, tune  # noqa: F401
from tests.te.test_configurations import settings

LING = ROOT / "pretrain/configs/ling_mini_2_0_anyexperts.yaml"
LOCAL = {key: value for key, (value, _) in (WITHOUT_CUDA | INSTEAD).items()}


def _write(path: Path, config: dict) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.slow
def test_a_local_checkpoint_goes_on_over_transformer_engine_and_is_tuned_in_fp8(corpus, chats, tmp_path):  # noqa: F811
    config = settings(LING, "bf16")
    local = _write(tmp_path / "local.yaml", {key: v for key, v in (config | LOCAL).items() if v is not None})
    whole = pretrain(corpus, tmp_path / "local", *FOUR, entry=DUMPING, config=local)
    before = live_state(whole.run.root / "live_saved/2")
    shutil.copytree(whole.run.root, tmp_path / "te")
    shutil.rmtree(tmp_path / "te/checkpoints/iter_0000004")
    resumed = pretrain(corpus, tmp_path / "te", *FOUR, entry=DUMPING, config=_write(tmp_path / "te.yaml", config))
    after = live_state(resumed.run.root / "live_loaded")
    assert before.keys() == after.keys()
    assert [key for key, values in before.items() if not torch.equal(values, after[key])] == []
    for iteration in (3, 4):
        assert math.isclose(resumed.losses[iteration], whole.losses[iteration], rel_tol=2e-3)

    fp8 = _write(tmp_path / "fp8.yaml", settings(LING, "tensorwise"))
    start = ("--pretrained-checkpoint", str(resumed.run.checkpoints), "--train-iters", "2", "--eval-interval", "2")
    tuned = tune(chats, tmp_path / "tuned", *start, config=fp8)
    assert list(tuned.losses) == [1, 2] and all(map(math.isfinite, tuned.losses.values()))
    answers = [event for event in runlog.read_events(tuned.run) if event["event"] == "answers"]
    assert [event["iteration"] for event in answers][:1] == [2]
