"""Whether importance, and real slots, fall on the patches that carry information: where it is known which those are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_anyexperts.data.encode import DocumentEncoder
from megatron_anyexperts.data.informative import picture_id
from megatron_anyexperts.data.microbatch import LOGIT_INPUTS, collate
from megatron_anyexperts.data.packing import assemble_row
from megatron_anyexperts.evaluation.answers import Question
from megatron_anyexperts.evaluation.without_fp8 import without_fp8
from megatron_anyexperts.media import IMAGE
from megatron_anyexperts.moe.metrics import record_tokens

LEAST_SHARE = 0.05
"""A token is informative from this share of its pixels, background at 0; what lies between counts as neither."""


@dataclass(frozen=True)
class Semantics:
    """What a layer does with informative and with background tokens of pictures.

    Attributes:
        auc: probability that an informative token has a higher importance than a background one, ties half.
        auc_same_place: the same, of pairs at the same place of their pictures only: importance has a trend along a
            picture, because later tokens have more to attend to, and that trend outweighs the rest.
        auc_real: as `auc`, of real slots.
        real_informative, real_background: mean real slots.
    """

    auc: float
    auc_same_place: float
    auc_real: float
    real_informative: float
    real_background: float

    @property
    def ratio(self) -> float:
        """Real slots of informative tokens over those of background."""
        return self.real_informative / self.real_background


def auc(informative: np.ndarray, background: np.ndarray) -> float:
    """P(informative > background) + P(equal) / 2, of all pairs (Mann-Whitney); NaN where one of them is empty."""
    if not len(informative) or not len(background):
        return float("nan")
    background = np.sort(background)
    below = np.searchsorted(background, informative, "left") + np.searchsorted(background, informative, "right")
    return float(below.mean() / 2 / len(background))


def auc_by_place(values: np.ndarray, informative: np.ndarray, background: np.ndarray, places: np.ndarray) -> float:
    """The share of pairs in order, as `auc`, among those of one place; NaN where there are none.

    Args:
        values, informative, background, places: of each token what is compared, which it is, and where, [N].
    """
    right = pairs = 0.0
    for place in np.unique(places):
        here = places == place
        first, second = values[here & informative], values[here & background]
        if len(first) and len(second):
            pairs += len(first) * len(second)
            right += len(first) * len(second) * auc(first, second)
    return right / pairs if pairs else float("nan")


@torch.no_grad()
def semantics(
    model: torch.nn.Module, encoder: DocumentEncoder, questions: list[Question], masks: dict[str, np.ndarray]
) -> dict[int, Semantics]:
    """Measure each mixture layer, 1-based, on the questions whose one picture has a mask; each picture once.

    Args:
        model: in evaluation mode.
        encoder: of the run.
        questions: from `answers.read_questions`.
        masks: from `data.informative.read_masks`.
    """
    columns: dict[int, list[np.ndarray]] = {}
    shares = []
    for question, share in with_masks(questions, masks, encoder.shape):
        batch = alone(encoder, question)
        here_S = batch["token_modality"][0].numpy() == IMAGE
        with record_tokens() as layers, without_fp8(model):
            model(**{name: batch[name].to(torch.cuda.current_device()) for name in LOGIT_INPUTS})
        shares.append(share)
        for number, [record] in layers.items():
            both_2S = np.stack((record.importance_SB[:, 0].float().numpy(), record.real_SB[:, 0].numpy()))
            columns.setdefault(number, []).append(both_2S[:, here_S])
    informative, background = (np.concatenate(shares) > LEAST_SHARE, np.concatenate(shares) == 0)
    # Pictures of different sizes share no place.
    places = np.concatenate([np.arange(len(share)) + (len(share) << 32) for share in shares] or [np.zeros(0)])
    result = {}
    for number, parts in columns.items():
        importance, real = np.concatenate(parts, axis=1)
        result[number] = Semantics(
            auc(importance[informative], importance[background]),
            auc_by_place(importance, informative, background, places),
            auc(real[informative], real[background]),
            float(real[informative].mean()),
            float(real[background].mean()),
        )
    return result


def with_masks(
    questions: list[Question], masks: dict[str, np.ndarray], shape: Any
) -> Iterator[tuple[Question, np.ndarray]]:
    """Yield questions with the informative share of each token of their picture, flat; no picture twice."""
    seen = set()
    for question in questions:
        if len(question.planned.frames) != 1:
            continue
        [frames] = question.planned.frames
        name = picture_id(frames.media.data)
        if name in seen or name not in masks:
            continue
        seen.add(name)
        (_, height, width), merge, mask = frames.grid, shape.spatial_merge, masks[name]
        if mask.shape != (height, width):
            raise ValueError(f"mask of {mask.shape} patches for a picture of {height} x {width}; give both one size")
        yield question, mask.reshape(height // merge, merge, width // merge, merge).mean((1, 3)).ravel()


def alone(encoder: DocumentEncoder, question: Question) -> dict[str, torch.Tensor]:
    """A microbatch of one question."""
    planned = encoder.decode(question.planned)
    pad_id = encoder.vocabulary.special["<|pad|>"]
    return collate([assemble_row([planned], len(planned.tokens) - 1, encoder.shape, pad_id)], [])


def semantics_table(layers: dict[int, Semantics]) -> str:
    """The measurement as text, a line per layer."""
    heads = ("layer", "AUC", "at one place", "of real slots", "real slots: informative", "background", "ratio")
    widths = (5, 6, 12, 13, 24, 11, 6)
    lines = [" ".join(f"{head:>{width}s}" for head, width in zip(heads, widths, strict=True))]
    lines += [
        f"{number:5d} {one.auc:6.2f} {one.auc_same_place:12.2f} {one.auc_real:13.2f} "
        f"{one.real_informative:24.2f} {one.real_background:11.2f} {one.ratio:6.2f}"
        for number, one in layers.items()
    ]
    return "\n".join(lines)
