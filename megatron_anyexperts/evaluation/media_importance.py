"""Importance and slots of the tokens of held-out images, of the text beside them, and of video frames."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_anyexperts.data.vocabulary import Vocabulary
from megatron_anyexperts.evaluation.held_out import forward, held_out_batches
from megatron_anyexperts.media import IMAGE, TEXT, VISION_CODES, MediaShape
from megatron_anyexperts.moe.metrics import TokenRecord, record_tokens


@dataclass(frozen=True)
class ImageImportance:
    """One image as the model saw it.

    Attributes:
        pixels: [height, width, 3] in 0..1.
        importance: [height / m, width / m] fp32 in (0, 1), mean over layers; m pixels a side per token.
        slots: the same shape, mean slots over layers.
        title: shown above.
        words: the text tokens of the same document, in order.
        word_importance, word_slots: [len(words)], likewise.
    """

    pixels: np.ndarray
    importance: np.ndarray
    slots: np.ndarray
    title: str
    words: list[str]
    word_importance: np.ndarray
    word_slots: np.ndarray


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


@dataclass
class MediaImportance:
    """Held-out media as one model saw them.

    Attributes:
        layers: mixture layers over which importance and slots are means.
        iteration: of the checkpoint.
        slot_range: fewest and most slots of a token.
    """

    layers: list[int]
    iteration: int
    slot_range: tuple[int, int]
    images: list[ImageImportance] = field(default_factory=list)
    videos: list[VideoImportance] = field(default_factory=list)

    @property
    def source(self) -> str:
        """Where the figures are from, for a title."""
        numbers = ", ".join(map(str, self.layers[:8])) + (f", ... {self.layers[-1]}" if len(self.layers) > 8 else "")
        layers = f"mean over mixture layers {numbers}" if len(self.layers) > 1 else f"mixture layer {numbers}"
        return f"{layers}; iteration {self.iteration}"


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


def media_importance(args: argparse.Namespace, model: torch.nn.Module, count: int) -> MediaImportance:
    """Return the first held-out images and videos with the importance and slots of their tokens, means over layers.

    Args:
        args: from `inference.start`.
        model: from `inference.load_model`.
        count: most images, and most videos.
    """
    shape = MediaShape.from_args(args)
    vocabulary = Vocabulary(args.tokenizer_model)
    found = MediaImportance([], args.iteration, (model.config.anyexperts_k_min, model.config.anyexperts_k_max))
    images, videos = found.images, found.videos
    for batch in held_out_batches(args, microbatches=4 * count):
        if not len(batch["image_grids"]):
            continue
        with record_tokens() as layers:
            forward(model, batch)
        found.layers = sorted(layers)
        for one in _split_media(batch, [records[0] for records in layers.values()], shape, vocabulary):
            (images if isinstance(one, ImageImportance) else videos).append(one)
        if len(images) >= count and len(videos) >= count:
            break
    del images[count:], videos[count:]
    return found


def _split_media(
    batch: dict[str, Any], layers: list[TokenRecord], shape: MediaShape, vocabulary: Vocabulary
) -> Iterator[ImageImportance | VideoImportance]:
    importance_BS = torch.stack([layer.importance_SB for layer in layers]).mean(0).T
    slots_BS = torch.stack([layer.slots_SB.float() for layer in layers]).mean(0).T
    kinds_BS = batch["token_modality"].cpu()
    seen_BS = torch.isin(kinds_BS, torch.tensor(VISION_CODES))
    importance, slots, kinds = importance_BS[seen_BS], slots_BS[seen_BS], kinds_BS[seen_BS]
    places, segments_BS = seen_BS.nonzero().tolist(), batch["segment_ids"].cpu()
    patch, token = 0, 0
    for frames, height, width in batch["image_grids"].tolist():
        here = slice(token, token + shape.image_token_count((frames, height, width)))
        grid = (frames, height // shape.spatial_merge, width // shape.spatial_merge)
        patches = batch["image_patches"][patch : patch + frames * height * width].cpu()
        pixels = [unpatch(frame, height, width, shape.patch_size) for frame in patches.chunk(frames)]
        weights, counts = importance[here].reshape(grid).numpy(), slots[here].reshape(grid).numpy()
        row = places[token][0]
        segment = int(segments_BS[row, places[token][1]])
        kind, _, name = batch.sample_keys[row][segment - 1].partition("/")
        title = f"{kind}/{name[:16]}, {here.stop - here.start} tokens"
        if kinds[token] == IMAGE:
            beside = (segments_BS[row] == segment) & (kinds_BS[row] == TEXT)
            words = [vocabulary.decode([each]) for each in batch["tokens"][row].cpu()[beside].tolist()]
            text = (words, importance_BS[row][beside].numpy(), slots_BS[row][beside].numpy())
            yield ImageImportance(pixels[0], weights[0], counts[0], title, *text)
        else:
            means = (values.mean((1, 2)) for values in (weights, counts))
            yield VideoImportance(pixels, *means, title)
        patch, token = patch + len(patches), here.stop
