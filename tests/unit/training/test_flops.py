"""Operations counted by formula are those that torch counts, and those of a count by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_anyexperts.moe.metrics import record_tokens
from megatron_anyexperts.training.flops import WORK, ModelFlops, measure_work
from tests.unit.models.small import DYNAMIC, SHAPE, media_batch, small_arguments, small_config, text_batch

NO_MEDIA = {"image_grids": torch.zeros(0, 3, dtype=torch.int32), "audio_lengths": torch.zeros(0, dtype=torch.int32)}
SHARED = {"moe_shared_expert_intermediate_size": 16}


def counted(model, batch) -> tuple[int, int, int]:
    """Operations that torch sees in forward and backward passes, and the real slots of the forward pass."""
    counter = FlopCounterMode(display=False)
    with counter, record_tokens() as layers, sdpa_kernel(SDPBackend.MATH):
        output = model(**batch)
        forward = counter.get_total_flops()
        output.square().sum().backward()
    slots = sum(int(record.real_SB.sum()) for records in layers.values() for record in records)
    return forward, counter.get_total_flops(), slots


def formula(pattern: str, **options) -> ModelFlops:
    args = SimpleNamespace(**small_arguments(hybrid_layer_pattern=pattern))
    return ModelFlops.from_args(args, small_config(pattern, **options))


@pytest.mark.parametrize("pattern, options", [("*-", {}), ("*-*E*E", DYNAMIC | SHARED)], ids=["dense", "mixture"])
def test_text_costs_what_torch_counts(make_model, pattern, options):
    model = make_model({"hybrid_layer_pattern": pattern, "vision_num_layers": 0, "audio_num_layers": 0}, **options)
    batch = text_batch([12])
    forward, both, slots = counted(model, {name: batch[name] for name in ("tokens", "position_ids")})
    work = dict(zip(WORK, measure_work(batch | NO_MEDIA, SHAPE).tolist(), strict=True))
    assert work["tokens"] == 12 and work["token_pairs"] == 12 * 13 / 2
    work["token_pairs"] = 12 * 12  # torch computes the masked half as well
    flops = formula(pattern, **options)
    flops = replace(flops, encoders=replace(flops.encoders, vision_num_layers=0, audio_num_layers=0))
    assert sum(flops.forward(work, slots).values()) == forward
    # torch overlooks one product in place, of the gradient of importance.
    overlooked = 2 * 2 * 12 * 32 * 32 if "E" in pattern else 0
    assert flops.training(work, slots) == both + overlooked


def test_media_cost_what_torch_counts(make_model):
    batch = media_batch()
    del batch["segment_ids"], batch["labels"]
    model = make_model({"hybrid_layer_pattern": "*-"})
    forward, both, _ = counted(model, batch)
    work = dict(zip(WORK, measure_work(media_batch(), SHAPE).tolist(), strict=True))
    assert work == {
        "tokens": 10, "token_pairs": 55,
        "patches": 8 + 2 * 4, "patch_pairs": 8**2 + 2 * 4**2,
        "frames": 7, "steps": 4, "step_pairs": 4**2, "clip_tokens": 2,
    }  # fmt: skip
    # Without segments the decoder reads the padding and all pairs; the local encoders pad clips to an even length and
    # frames to the longest: the blocks of the vision encoder run on 24 positions, of which 16 are patches.
    computed = work | {"tokens": 12, "token_pairs": 144, "frames": 8, "patch_pairs": 3 * 64}
    flops = formula("*-").forward(computed, 0)
    padded = 2 * 8 * (4 * 16**2 + 2 * 16 * 40)
    assert sum(flops.values()) + padded == forward
    # Pixels and frames need no gradient.
    assert both < formula("*-").training(computed, 0) + 3 * padded < 1.05 * both


def test_a_mixture_layer_costs_its_real_slots():
    flops = formula("*E", **DYNAMIC)
    work = dict.fromkeys(WORK, 0.0) | {"tokens": 100.0}
    without, with_slots = (flops.forward(work, slots)["decoder"] for slots in (0, 250))
    # three matrices of 32 x 16 for a gated expert
    assert with_slots - without == 250 * 2 * 3 * 32 * 16
    attention, router, head = 2 * 32 * (32 + 16), 32 * (4 + 1) + 32 * 32, 32 * 64
    assert without == 100 * 2 * (attention + router + head)


def test_each_depth_of_prediction_costs_a_head():
    work = dict.fromkeys(WORK, 0.0) | {"tokens": 1.0}
    plain, depth = (formula(pattern).forward(work, 0)["decoder"] for pattern in ("*-*-", "*-*-/*-"))
    layer = 2 * 2 * 32 * (32 + 16) + 2 * 3 * 32 * 48
    assert depth - plain == layer + 2 * (2 * 32 * 32 + 32 * 64)


def test_frozen_parts_need_fewer_gradients():
    flops = formula("*-")

    def passes(part: str, *frozen: str) -> int:
        changed = {f"freeze_{name}": True for name in frozen}
        return replace(flops, encoders=replace(flops.encoders, **changed)).passes(part)

    assert all(passes(part) == 3 for part in flops.forward(dict.fromkeys(WORK, 1.0), 0))
    assert passes("vision_encoder", "vision_encoder") == 1
    assert passes("vision_projector", "vision_projector") == 2
    assert passes("vision_projector", "vision_projector", "vision_encoder") == 1
    assert passes("decoder", "decoder") == 2
    everything = ("vision_encoder", "vision_projector", "audio_encoder", "audio_projector", "importance", "decoder")
    assert passes("decoder", *everything) == 1
