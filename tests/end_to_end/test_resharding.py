"""Weights, fp32 masters and both Adam moments survive a change of layout, element by element.

`test_configurations.py` does the same for what the configurations say; here is what none of them says.
"""

import shutil

import pytest
import torch

from tests.end_to_end.dumping_pretrain import live_state
from tests.end_to_end.launch import DUMPING, pretrain

EP2 = ("--expert-model-parallel-size", "2")
# Importance stays fp32 among bf16 parameters.
BF16 = ("--bf16",)
# Buckets of a few thousand elements, each padded at its end.
SMALL_BUCKETS = ("--overlap-grad-reduce", "--ddp-bucket-size", "3000")
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-tensor-parallel-size", "1")
# Weight gradients that come home from copies arrive while buckets are reduced.
COPIES = ("--anyexperts-balance", "copies", "--anyexperts-copies-eps", "0", "--anyexperts-copies-per-rank", "2")


@pytest.mark.parametrize(
    "saved, loaded",
    [
        ((1, BF16), (2, (*BF16, *EP2, *COPIES))),
        ((2, (*EP2, *SMALL_BUCKETS, *COPIES)), (2, (*TP2, *SMALL_BUCKETS))),
    ],
    ids=["bf16, EP1 to EP2 with copies", "several buckets, EP2 with copies to TP2"],
)
def test_state_is_equal_after_resharding(corpus, tmp_path, saved, loaded):
    (ranks, flags), (new_ranks, new_flags) = saved, loaded
    first = pretrain(corpus, tmp_path / "run", *flags, "--exit-interval", "3", ranks=ranks, entry=DUMPING)
    before = live_state(first.run.root / "live_saved/3")
    second = pretrain(corpus, tmp_path / "run", *new_flags, "--exit-interval", "4", ranks=new_ranks, entry=DUMPING)
    after = live_state(second.run.root / "live_loaded")

    assert before.keys() == after.keys()
    states = {key[-1] for key in before}
    assert {"weight", "param", "exp_avg", "exp_avg_sq"} <= states
    for key, values in before.items():
        assert torch.equal(values, after[key]), key
    trained = [key for key in before if key[-1] == "exp_avg"]
    assert sum(before[key].abs().sum() > 0 for key in trained) > 0.9 * len(trained)
    shutil.rmtree(first.run.root)
