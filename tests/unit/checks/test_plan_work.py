"""Operations by formula are those of the run's own count, of Megatron's and of torch's counter."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from megatron.training.training import num_floating_point_operations

from megatron_anyexperts.checks.plan_sizes import LatentSizes
from megatron_anyexperts.checks.plan_work import again, encoder_again, encoder_work, layer_work, training_operations
from megatron_anyexperts.media import MediaShape
from megatron_anyexperts.models.build import EncoderConfig
from megatron_anyexperts.training.flops import WORK, ModelFlops
from tests.unit.checks.planned import MIXTURE, SEQUENCE, layout, megatron_arguments
from tests.unit.checks.test_plan_parameters import sizes_of
from tests.unit.models.small import DYNAMIC, small_arguments, small_config

LATENT = LatentSizes(96, 64, 32, 16, 48)


@pytest.mark.parametrize("latent", [None, LATENT])
def test_operations_are_megatrons_and_the_routers(latent):
    mixture = replace(MIXTURE.mixture, real=6)
    sizes = replace(MIXTURE, mixture=mixture, latent=latent, groups=16 if latent else 8, vision=None)
    theirs = num_floating_point_operations(megatron_arguments(sizes, layout()), 1)
    routers = sizes.hidden * mixture.experts
    # Megatron takes the norms of compressed queries, keys and values for products.
    norms = latent.query_rank + latent.kv_rank if latent else 0
    ours = training_operations(sizes, SEQUENCE) - 6 * 8 * (routers - norms)
    assert ours * SEQUENCE == pytest.approx(theirs, rel=1e-9)


def test_operations_are_those_that_a_run_counts():
    pattern, tokens = "*-*E/*E", 96
    config = small_config(pattern, **DYNAMIC, moe_shared_expert_intermediate_size=16, mtp_num_layers=1)
    arguments = small_arguments(hybrid_layer_pattern=pattern)
    sizes = sizes_of(config, arguments)
    names = SimpleNamespace(**arguments)
    encoders = replace(EncoderConfig.from_args(names), vision_num_layers=0, audio_num_layers=0)
    counted = ModelFlops(config, pattern, 64, encoders, MediaShape.from_args(names))
    work = dict.fromkeys(WORK, 0.0) | {"tokens": tokens, "token_pairs": tokens * (tokens + 1) / 2}
    slots = 2 * sizes.mixture.real * tokens
    # A token attends to itself and those before it: half of one more than the document.
    assert training_operations(sizes, tokens + 1) * tokens == pytest.approx(counted.training(work, slots), rel=1e-9)


def test_an_encoders_operations_are_those_that_a_run_counts():
    arguments = small_arguments()
    sizes = sizes_of(small_config("*-"), arguments)
    names = SimpleNamespace(**arguments)
    counted = ModelFlops(small_config("*-"), "*-", 64, EncoderConfig.from_args(names), MediaShape.from_args(names))
    tokens, neighbours = 5, 20
    work = dict.fromkeys(WORK, 0.0) | {"patches": 4 * tokens, "patch_pairs": 4 * tokens * neighbours}
    theirs = counted.forward(work, 0)
    ours = encoder_work(sizes.vision, sizes.hidden, neighbours).operations * tokens
    assert ours == pytest.approx(theirs["vision_encoder"] + theirs["vision_projector"], rel=1e-9)


def test_what_is_recomputed_costs_at_most_a_forward_pass():
    for letter in "*-E":
        work = layer_work(MIXTURE, letter, SEQUENCE)
        for modules in ({"layernorm"}, {"moe_act"}, {"mlp"}, {"moe"}, {"core_attn"}, {"shared_experts"}):
            repeated = again(MIXTURE, letter, frozenset(modules), work)
            assert 0 <= repeated.operations <= work.operations and 0 <= repeated.moved <= work.moved
        assert again(MIXTURE, letter, frozenset({"full"}), work) == work
    picture = encoder_work(MIXTURE.vision, MIXTURE.hidden, 1024)
    assert 0 < encoder_again(MIXTURE.vision, frozenset({"moe_act"}), picture).operations < picture.operations
    assert encoder_again(MIXTURE.vision, frozenset({"layernorm"}), picture).operations == 0
