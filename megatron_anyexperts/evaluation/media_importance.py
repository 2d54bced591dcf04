"""Importance and slots of the tokens of held-out images and video frames."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_anyexperts.evaluation.held_out import forward, held_out_batches
from megatron_anyexperts.media import IMAGE, VISION_CODES, MediaShape
from megatron_anyexperts.moe.metrics import TokenRecord, record_tokens


@dataclass(frozen=True)
class ImageImportance:
    """One image as the model saw it.

    Attributes:
        pixels: [height, width, 3] in 0..1.
        importance: [height / m, width / m] fp32 in (0, 1), mean over layers; m pixels a side per token.
        slots: the same shape, mean slots over layers.
        title: shown above.
    """

    pixels: np.ndarray
    importance: np.ndarray
    slots: np.ndarray
    title: str


@dataclass(frozen=True)
class VideoImportance:
    """One video as the model saw it.

    Attributes:
        frames: [height, width, 3] each, in 0..1.
        importance: [frames] fp32 in (0, 1), mean over a frame's tokens and over layers.
        slots: [frames], mean slots, likewise.
        title: shown above.
    """

    frames: list[np.ndarray]
    importance: np.ndarray
    slots: np.ndarray
    title: str


def unpatch(patches: torch.Tensor, height: int, width: int, patch_size: int) -> np.ndarray:
    """Put normalised patches back together.

    Args:
        patches: [height * width, 3 * patch_size**2] fp32, mean 0.5 and standard deviation 0.5 removed, row by row.
        height: patches from top to bottom.
        width: patches from left to right.
        patch_size: pixels a side.

    Returns:
        [height * patch_size, width * patch_size, 3] in 0..1.
    """
    tiles = patches.reshape(height, width, 3, patch_size, patch_size).permute(0, 3, 1, 4, 2)
    return (tiles.reshape(height * patch_size, width * patch_size, 3) * 0.5 + 0.5).clamp(0, 1).numpy()


def media_importance(
    args: argparse.Namespace, model: torch.nn.Module, count: int
) -> tuple[list[ImageImportance], list[VideoImportance]]:
    """Return the first held-out images and videos with the importance and slots of their tokens, means over layers.

    Args:
        args: from `inference.start`.
        model: from `inference.load_model`.
        count: most images, and most videos.
    """
    shape = MediaShape.from_args(args)
    images: list[ImageImportance] = []
    videos: list[VideoImportance] = []
    for batch in held_out_batches(args, microbatches=4 * count):
        if not len(batch["image_grids"]):
            continue
        with record_tokens() as layers:
            forward(model, batch)
        for one in _split_media(batch, [records[0] for records in layers.values()], shape):
            (images if isinstance(one, ImageImportance) else videos).append(one)
        if len(images) >= count and len(videos) >= count:
            break
    return images[:count], videos[:count]


def _split_media(
    batch: dict[str, Any], layers: list[TokenRecord], shape: MediaShape
) -> Iterator[ImageImportance | VideoImportance]:
    importance_BS = torch.stack([layer.importance_SB for layer in layers]).mean(0).T
    slots_BS = torch.stack([layer.slots_SB.float() for layer in layers]).mean(0).T
    kinds_BS = batch["token_modality"].cpu()
    seen_BS = torch.isin(kinds_BS, torch.tensor(VISION_CODES))
    importance, slots, kinds = importance_BS[seen_BS], slots_BS[seen_BS], kinds_BS[seen_BS]
    patch, token = 0, 0
    for number, (frames, height, width) in enumerate(batch["image_grids"].tolist()):
        here = slice(token, token + shape.image_token_count((frames, height, width)))
        grid = (frames, height // shape.spatial_merge, width // shape.spatial_merge)
        patches = batch["image_patches"][patch : patch + frames * height * width].cpu()
        pixels = [unpatch(frame, height, width, shape.patch_size) for frame in patches.chunk(frames)]
        weights, counts = importance[here].reshape(grid).numpy(), slots[here].reshape(grid).numpy()
        tokens = f"{here.stop - here.start} tokens"
        if kinds[token] == IMAGE:
            yield ImageImportance(pixels[0], weights[0], counts[0], f"held-out image {number}, {tokens}")
        else:
            means = (values.mean((1, 2)) for values in (weights, counts))
            yield VideoImportance(pixels, *means, f"held-out video {number}, {tokens}")
        patch, token = patch + len(patches), here.stop
