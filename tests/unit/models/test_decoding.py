"""Decoding with a cache of keys and values gives the logits of one pass over the whole sequence."""

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode

from tests.unit.models.small import DYNAMIC, STOCK, media_batch


def part(batch, positions):
    return {key: batch[key][:, positions] for key in ("tokens", "position_ids")}


@pytest.mark.parametrize("steps", [[9, 1, 1, 1], [9, 3]])
@pytest.mark.parametrize("routing", [STOCK, DYNAMIC])
@pytest.mark.parametrize("mtp_layers", [0, 1])
@torch.no_grad()
def test_prefill_and_steps_agree_with_one_pass(make_model, steps, routing, mtp_layers):
    settings = routing | {"qk_layernorm": True, "mtp_num_layers": mtp_layers or None}
    model = make_model({"hybrid_layer_pattern": "*-*E" + "/*E" * mtp_layers}, **settings)
    model.eval()
    batch = media_batch()
    media = {key: value for key, value in batch.items() if key.startswith(("image", "audio"))}
    with InferenceMode.active():
        context = StaticInferenceContext(1, 12)
        decoded, start = [], 0
        for length in steps:
            positions = slice(start, start + length)
            inputs = part(batch, positions)
            if start == 0:
                inputs |= media | {"token_modality": batch["token_modality"][:, positions]}
            decoded.append(model(**inputs, inference_context=context, runtime_gather_output=True))
            start += length
            context.sequence_len_offset = start
    whole = part(batch, slice(None)) | media | {"token_modality": batch["token_modality"]}
    logits = model(**whole)
    ends = torch.tensor(steps).cumsum(0) - 1
    torch.testing.assert_close(torch.cat(decoded, dim=1), logits[:, ends])
