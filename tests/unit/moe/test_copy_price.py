"""What `--anyexperts-balance auto` decides, and why it says so."""

import pytest

from megatron_anyexperts.hardware import GPUS, gpu_named
from megatron_anyexperts.moe.copy_price import expert_size, price, settle_on
from tests.unit.moe import builders

H100 = "NVIDIA H100 80GB HBM3"


def auto(**options):
    return builders.config(anyexperts_balance="auto", expert_model_parallel_size=2, **options)


def test_a_copy_pays_from_the_slots_on_that_cost_as_much_time_as_it():
    weights, read, gpu = 3 * 2048 * 512, 2048, GPUS["h100"]
    near, far = (price(weights, read, False, gpu, within) for within in (True, False))
    # Ling-mini-2.0's experts, 6.3 MB in bf16: four times that over 450 GB/s at 75 %, or 50 GB/s at 80 %.
    assert near.seconds == pytest.approx(4 * 6.291456e6 / 337.5e9) and far.seconds == pytest.approx(
        4 * 6.291456e6 / 40e9
    )
    assert 1 < near.slots < far.slots
    assert price(weights, read, True, gpu, True).slots > near.slots  # FP8 saves less time a slot


@pytest.mark.parametrize(
    "device, known",
    [(H100, "h100"), ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200")]
    + [(name, None) for name in ("NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-80GB", "a CPU", "")],
)
def test_gpus_are_known_by_the_name_that_the_driver_gives(device, known):
    assert gpu_named(device) is GPUS.get(known)


def test_auto_copies_where_the_cost_is_known_and_says_from_how_many_slots():
    config = auto()
    near, far = (settle_on(config, H100, 2, nodes) for nodes in (1, 2))
    assert near.copies and near.least == price(*expert_size(config), False, GPUS["h100"], True).slots
    assert far.least > near.least and "over the network" in far.why and f"{near.least} slots" in near.why
    assert settle_on(auto(anyexperts_copies_min_slots=10**6), H100, 2, 1).least == 10**6


def test_auto_makes_no_copies_where_it_cannot_know_and_says_so():
    assert not (balance := settle_on(auto(), "a CPU", 2, 1)).copies and "a CPU is not known" in balance.why
    config = auto()
    config.fp8, config.fp8_recipe = "hybrid", "delayed"  # set late: its checks need Transformer Engine
    assert not (balance := settle_on(config, H100, 2, 1)).copies and "fp8_recipe=delayed does not" in balance.why
    config.fp8_recipe = "tensorwise"
    assert settle_on(config, H100, 2, 1).copies


def test_what_is_asked_for_is_done_without_a_word():
    assert settle_on(builders.config(anyexperts_balance="copies"), "a CPU", 2, 1).copies
    assert settle_on(builders.config(anyexperts_balance="copies"), "a CPU", 1, 1) == settle_on(auto(), H100, 1, 1)
    assert settle_on(builders.config(), H100, 2, 1).why == ""
