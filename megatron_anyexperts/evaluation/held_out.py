"""What a trained model does with held-out data: its losses, and importance over images and video frames."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from megatron_anyexperts.analysis.pictures import ImageImportance, VideoImportance, unpatch
from megatron_anyexperts.media import MediaShape
from megatron_anyexperts.moe.metrics import TokenRecord, record_tokens
from megatron_anyexperts.training.batch import TENSORS
from megatron_anyexperts.training.data import data_settings


def held_out_batches(args: argparse.Namespace, microbatches: int) -> Iterator[dict[str, Any]]:
    """Yield the first microbatches of the held-out set on this process's device.

    Args:
        args: from `inference.start`.
        microbatches: how many.
    """
    from megatron_anyexperts.data.validation import ValidationLoader

    loader = ValidationLoader(**data_settings(args), micro_batch_size=args.micro_batch_size, microbatches=microbatches)
    device = torch.device(torch.cuda.current_device())
    for _ in range(microbatches):
        batch = next(loader)
        yield {**{name: batch[name].to(device) for name in TENSORS}, "sample_keys": batch["sample_keys"]}


def forward(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Return the [B, S] losses of one microbatch."""
    with torch.no_grad():
        return model(**{name: value for name, value in batch.items() if name not in ("sample_keys", "sample_modality")})


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
    seen_BS = (kinds_BS == 1) | (kinds_BS == 3)
    importance, slots, kinds = importance_BS[seen_BS], slots_BS[seen_BS], kinds_BS[seen_BS]
    patch, token = 0, 0
    for number, (frames, height, width) in enumerate(batch["image_grids"].tolist()):
        here = slice(token, token + shape.image_token_count((frames, height, width)))
        grid = (frames, height // shape.spatial_merge, width // shape.spatial_merge)
        patches = batch["image_patches"][patch : patch + frames * height * width].cpu()
        pixels = [unpatch(frame, height, width, shape.patch_size) for frame in patches.chunk(frames)]
        weights, counts = importance[here].reshape(grid).numpy(), slots[here].reshape(grid).numpy()
        tokens = f"{here.stop - here.start} tokens"
        if kinds[token] == 1:
            yield ImageImportance(pixels[0], weights[0], counts[0], f"held-out image {number}, {tokens}")
        else:
            means = (values.mean((1, 2)) for values in (weights, counts))
            yield VideoImportance(pixels, *means, f"held-out video {number}, {tokens}")
        patch, token = patch + len(patches), here.stop
