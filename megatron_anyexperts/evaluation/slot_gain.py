"""What slots on pictures are worth: how the loss of answers changes when tokens get the most instead of the fewest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from megatron_anyexperts.data.encode import DocumentEncoder
from megatron_anyexperts.data.microbatch import TRAINING_INPUTS
from megatron_anyexperts.evaluation.answers import Question
from megatron_anyexperts.evaluation.informative import alone, with_masks
from megatron_anyexperts.media import IMAGE
from megatron_anyexperts.moe.router import AnyExpertsRouter

PICTURES = 100
"""Pictures that are measured at most: each takes a forward pass for each kind of token."""


@dataclass(frozen=True)
class Gain:
    """Loss of the answers less that with the fewest slots on all tokens of the picture: negative where slots help.

    Attributes:
        mean: over pictures, per answer token.
        error: its standard error.
        pictures: how many.
    """

    mean: float
    error: float
    pictures: int


@contextmanager
def extreme_slots(model: torch.nn.Module, most_T: torch.Tensor, changed_T: torch.Tensor) -> Iterator[None]:
    """Give tokens the most or the fewest slots of the range in every mixture layer; the others keep what they have.

    Args:
        model: of one microbatch of T tokens.
        most_T: bool, who gets the most.
        changed_T: bool, who is given either.
    """
    # Slots follow from importance + offset, cut off at 0 and 1, and the offset lies in -1..1.
    forced_T = torch.where(most_T, 3.0, -3.0)

    def change(_, inputs: tuple) -> tuple:
        hidden, padding, importance_T = inputs
        return hidden, padding, torch.where(changed_T, forced_T, importance_T)

    routers = [module for module in model.modules() if isinstance(module, AnyExpertsRouter)]
    hooks = [router.register_forward_pre_hook(change) for router in routers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def slot_gains(
    model: torch.nn.Module, encoder: DocumentEncoder, questions: list[Question], masks: dict[str, np.ndarray]
) -> dict[str, Gain]:
    """Measure what the most slots are worth on ``informative``, on ``background`` and on ``all`` tokens of pictures.

    Args:
        model: in evaluation mode, with a range of slots.
        encoder, questions, masks: as for `informative.semantics`.
    """
    losses: dict[str, list[float]] = {"none": [], "informative": [], "background": [], "all": []}
    for question, share in islice(with_masks(questions, masks, encoder.shape), PICTURES):
        batch = alone(encoder, question)
        picture_T = batch["token_modality"][0] == IMAGE
        informative_T = torch.zeros_like(picture_T)
        informative_T[picture_T] = torch.from_numpy(share > 0)
        inputs = {name: batch[name].to(torch.cuda.current_device()) for name in TRAINING_INPUTS}
        most = {"none": picture_T & False, "informative": informative_T, "background": picture_T & ~informative_T}
        for name, most_T in (most | {"all": picture_T}).items():
            with extreme_slots(model, most_T, picture_T):
                losses_S = model(**inputs)[0].float().cpu()
            mask_S = batch["loss_mask"][0]
            losses[name].append(float((losses_S * mask_S).sum() / mask_S.sum()))
    fewest = np.array(losses.pop("none"))
    differences = {name: np.array(each) - fewest for name, each in losses.items()}
    return {
        name: Gain(float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each))), len(each))
        for name, each in differences.items()
        if len(each) > 1
    }


def gains_text(gains: dict[str, Gain]) -> str:
    """The measurement as a sentence."""
    words = [f"{name} {one.mean:+.4f} +- {one.error:.4f}" for name, one in gains.items()]
    return f"loss of answers with the most instead of the fewest slots on tokens of the picture: {', '.join(words)}"
