"""What slots are worth: exactly the named tokens get the most, and the loss is the answers'."""

import numpy as np
import pytest
import torch

from megatron_anyexperts.data.informative import picture_id
from megatron_anyexperts.data.microbatch import TRAINING_INPUTS
from megatron_anyexperts.evaluation.informative import alone
from megatron_anyexperts.evaluation.slot_gain import extreme_slots, gains_text, slot_gains
from megatron_anyexperts.media import IMAGE
from megatron_anyexperts.moe.metrics import record_tokens
from tests.unit.evaluation.test_informative import question, shown


@torch.no_grad()
def test_the_named_tokens_get_the_most_or_the_fewest_slots(encoder, model):
    batch = alone(encoder, question(encoder, "a", 1))
    inputs = {name: batch[name] for name in TRAINING_INPUTS}
    picture_T = batch["token_modality"][0] == IMAGE
    most_T = picture_T & (torch.arange(len(picture_T)) % 2 == 0)
    with record_tokens() as before:
        model(**inputs)
    with extreme_slots(model, most_T, picture_T), record_tokens() as after:
        model(**inputs)
    with record_tokens() as restored:
        model(**inputs)
    config = model.config
    for layer in before:
        slots_T = after[layer][0].slots_SB[:, 0]
        assert set(slots_T[most_T].tolist()) == {config.anyexperts_k_max}
        assert set(slots_T[picture_T & ~most_T].tolist()) == {config.anyexperts_k_min}
        assert torch.equal(restored[layer][0].slots_SB, before[layer][0].slots_SB)
    # Text before the picture cannot see it, and text keeps its own slots in the first mixture layer.
    first = min(before)
    assert torch.equal(after[first][0].slots_SB[~picture_T], before[first][0].slots_SB[~picture_T])


def test_gains_are_differences_of_the_answers_losses(encoder, model):
    asked = [question(encoder, "a", number) for number in range(3)]
    rows, columns = asked[0].planned.grids[0][1:]
    everything = {picture_id(shown(one)[0]): np.ones((rows, columns)) for one in asked}
    gains = slot_gains(model, encoder, asked, everything)
    assert gains["informative"] == gains["all"] and gains["all"].pictures == 3
    assert gains["background"].mean == 0 and gains["all"].mean != 0
    nothing = {name: np.zeros((rows, columns)) for name in everything}
    assert slot_gains(model, encoder, asked, nothing)["background"] == gains["all"]
    batch = alone(encoder, asked[0])
    picture_T = batch["token_modality"][0] == IMAGE
    one = slot_gains(model, encoder, [asked[0], asked[1]], everything)["all"]
    expected = []
    for each in asked[:2]:
        batch = alone(encoder, each)
        losses = []
        for most_T in (picture_T, picture_T & False):
            with torch.no_grad(), extreme_slots(model, most_T, picture_T):
                losses_BS = model(**{name: batch[name] for name in TRAINING_INPUTS})
            losses.append((losses_BS * batch["loss_mask"]).sum() / batch["loss_mask"].sum())
        expected.append(float(losses[0] - losses[1]))
    assert one.mean == pytest.approx(np.mean(expected), abs=1e-6)
    assert one.error == pytest.approx(abs(expected[0] - expected[1]) / 2, abs=1e-6)
    assert "informative +" in gains_text(gains) or "informative -" in gains_text(gains)
