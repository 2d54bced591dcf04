"""A budget of waits for the GPU: one a mixture layer, two a microbatch."""

import numpy as np
import pytest
import torch
from megatron.core.transformer.multi_token_prediction import roll_tensor

from megatron_anyexperts.checks.operator_counts import OperatorCounts, count_operators
from megatron_anyexperts.data.microbatch import FIELDS, TRAINING_INPUTS, Microbatch, collate
from megatron_anyexperts.media import MODALITIES
from megatron_anyexperts.models.attention_inputs import attention_inputs
from megatron_anyexperts.moe.metrics import install_metrics, token_modality
from megatron_anyexperts.platform import packed_rows
from megatron_anyexperts.training.flops import measure_work
from megatron_anyexperts.training.step_stats import modality_sums
from tests.unit.models.small import DYNAMIC, SHAPE, media_batch


def microbatch() -> Microbatch:
    made = {name: tensor.numpy() for name, tensor in media_batch().items()}
    size = made["tokens"].shape[1]
    arrays = {name: np.zeros(size, field.numpy) for name, field in FIELDS.items() if not field.ragged}
    arrays |= {name: array if FIELDS[name].ragged else array[0] for name, array in made.items()}
    arrays["loss_mask"][:9] = 1
    return collate([arrays], [["a"]])


def waits_of_a_step(model: torch.nn.Module, batch: Microbatch) -> OperatorCounts:
    """What happens between the loader and the optimizer."""
    with count_operators() as counts:
        moved = batch.to(torch.device(torch.cuda.current_device()))
        measure_work(moved, SHAPE)
        with token_modality(moved["token_modality"]):
            losses = model(**moved.select(TRAINING_INPUTS))
        modality_sums(losses.detach(), moved["loss_mask"], moved["sample_modality"])
        (losses * moved["loss_mask"]).sum().backward()
    return counts


@pytest.mark.parametrize("routing", [{}, {"anyexperts_kernels": "on"}], ids=["operators", "kernel"])
def test_a_microbatch_with_media_and_prediction_layers_waits_once_a_mixture_layer(make_model, routing):
    settings = DYNAMIC | routing | {"mtp_num_layers": 1, "anyexperts_target_slots": 1.5}
    with count_operators():  # so that what the model keeps on the host is known to be there
        model = make_model({"hybrid_layer_pattern": "*E*E/*E"}, qk_layernorm=True, **settings)
    install_metrics(model.config, MODALITIES)
    waits_of_a_step(model, microbatch())  # what is made once
    counts = waits_of_a_step(model, microbatch())
    ours = {place: number for place, number in counts.waits.items() if place[1].startswith("megatron_anyexperts")}
    layers = {place: number for place, number in ours.items() if "/moe/" in place[1]}
    assert sum(layers.values()) == 3, layers
    assert sum(ours.values()) - 3 <= 2, ours


def test_packed_rows_are_described_and_rolled_without_waiting(one_rank):
    packed_rows.install()
    batch = microbatch()
    with count_operators() as counts:
        packed = attention_inputs(batch["segment_ids"], True, batch.sizes.documents).packed_seq_params
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            roll_tensor(batch[name], -1, -1, None, packed)
    assert not counts.waits
