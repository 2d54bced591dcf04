"""Megatron's own loop trains this model: alike with static routing, in any layout, and across an interruption."""

import math
import shutil

import pytest

from megatron_anyexperts.training.step_stats import read_sample_log
from tests.end_to_end.launch import pretrain

STATIC = (
    *("--anyexperts-k-min", "2", "--anyexperts-k-max", "2", "--anyexperts-rho-max", "0", "--anyexperts-alpha", "0"),
    *("--unset", "anyexperts-target-slots", "--unset", "anyexperts-target-real"),
    # Stock Megatron cannot combine the padding mask with the expert bias.
    *("--unset", "moe-router-enable-expert-bias"),
)
TWENTY = ("--train-iters", "20", "--save-interval", "100")


def test_static_routing_trains_exactly_like_stock_megatron(corpus, tmp_path):
    # With EP = 1 stock Megatron clips expert and dense gradients by one sum, which rounds differently.
    ep2 = ("--expert-model-parallel-size", "2")
    ours = pretrain(corpus, tmp_path / "ours", *STATIC, *TWENTY, *ep2, ranks=2)
    stock = pretrain(corpus, tmp_path / "stock", *STATIC, *TWENTY, *ep2, "--anyexperts-stock-moe", ranks=2)
    assert len(ours.losses) == 20
    assert ours.losses == stock.losses


@pytest.fixture(scope="module")
def from_one_step(corpus, tmp_path_factory):
    """Continues one checkpoint, since layouts draw their initial weights differently, up to iteration 21."""
    folder = tmp_path_factory.mktemp("layouts")
    until = ("--train-iters", "21", "--save-interval", "100")
    pretrain(corpus, folder / "start", *until, "--exit-interval", "1")

    def go(name: str, *flags: str, ranks: int = 1) -> dict[int, float]:
        shutil.copytree(folder / "start", folder / name)
        return pretrain(corpus, folder / name, *until, *flags, ranks=ranks).losses

    return go


@pytest.fixture(scope="module")
def one_rank(from_one_step):
    return from_one_step("EP1")


@pytest.mark.parametrize(
    "flags, tolerance",
    [
        (("--expert-model-parallel-size", "2"), 1e-4),
        (("--pipeline-model-parallel-size", "2", "--overlap-grad-reduce"), 1e-4),
        # Cut matrix products round every activation differently, and now and then a token's choice of experts flips.
        (("--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-tensor-parallel-size", "1"), 2e-3),
    ],
    ids=["EP2", "PP2", "TP2+SP"],
)
def test_the_layout_does_not_change_the_losses(from_one_step, one_rank, flags, tolerance, request):
    split = from_one_step(request.node.callspec.id, *flags, ranks=2)
    assert list(split) == list(one_rank) == list(range(1, 22))
    for iteration, loss in one_rank.items():
        assert math.isclose(loss, split[iteration], rel_tol=tolerance), iteration
    assert one_rank[21] < 0.9 * one_rank[1]


def test_resuming_on_fewer_ranks_trains_the_very_next_samples(corpus, tmp_path):
    ep2 = ("--expert-model-parallel-size", "2")
    whole = pretrain(corpus, tmp_path / "whole", *ep2, ranks=2)
    pretrain(corpus, tmp_path / "broken", *ep2, "--exit-interval", "3", ranks=2)
    resumed = pretrain(corpus, tmp_path / "broken")
    assert read_sample_log(resumed.run.samples) == read_sample_log(whole.run.samples)
    assert resumed.losses.keys() == whole.losses.keys()
    for iteration, loss in whole.losses.items():
        assert math.isclose(loss, resumed.losses[iteration], rel_tol=1e-5), iteration


def test_resuming_in_the_same_layout_is_bit_identical(corpus, tmp_path):
    whole = pretrain(corpus, tmp_path / "whole")
    pretrain(corpus, tmp_path / "broken", "--exit-interval", "3")
    resumed = pretrain(corpus, tmp_path / "broken")
    assert resumed.losses == whole.losses
