"""What a trained model does with held-out data: importance over images, and losses under other slot budgets."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from megatron_anyexperts.media import MediaShape
from megatron_anyexperts.moe.metrics import MODALITIES, TokenRecord, record_tokens
from megatron_anyexperts.training.batch import TENSORS
from megatron_anyexperts.training.data import data_settings
from megatron_anyexperts.training.pictures import ImageImportance, unpatch
from megatron_anyexperts.training.step_stats import modality_sums


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


def modality_losses(model: torch.nn.Module, batches: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean loss of each modality over all targets of `batches`."""
    sums = sum(modality_sums(forward(model, batch), batch["loss_mask"], batch["sample_modality"]) for batch in batches)
    return {name: total / targets for name, (total, targets) in zip(MODALITIES, sums.tolist(), strict=True) if targets}


def image_importance(args: argparse.Namespace, model: torch.nn.Module, count: int) -> list[ImageImportance]:
    """Return the first `count` held-out images with the importance and slots of their tokens, means over layers."""
    shape = MediaShape.from_args(args)
    images: list[ImageImportance] = []
    for batch in held_out_batches(args, microbatches=4 * count):
        if not (batch["token_modality"] == 1).any():
            continue
        with record_tokens() as layers:
            forward(model, batch)
        images += _split_images(batch, [records[0] for records in layers.values()], shape)
        if len(images) >= count:
            break
    return images[:count]


def _split_images(batch: dict[str, Any], layers: list[TokenRecord], shape: MediaShape) -> Iterator[ImageImportance]:
    importance_BS = torch.stack([layer.importance_SB for layer in layers]).mean(0).T
    slots_BS = torch.stack([layer.slots_SB.float() for layer in layers]).mean(0).T
    is_image_BS = (batch["token_modality"] == 1).cpu()
    importance, slots = importance_BS[is_image_BS], slots_BS[is_image_BS]
    patch, token = 0, 0
    for number, (frames, height, width) in enumerate(batch["image_grids"].tolist()):
        tokens = shape.image_token_count((frames, height, width))
        if frames == 1:
            grid = (height // shape.spatial_merge, width // shape.spatial_merge)
            patches = batch["image_patches"][patch : patch + height * width].cpu()
            yield ImageImportance(
                unpatch(patches, height, width, shape.patch_size),
                importance[token : token + tokens].reshape(grid).numpy(),
                slots[token : token + tokens].reshape(grid).numpy(),
                f"held-out image {number}, {tokens} tokens",
            )
            token += tokens
        patch += frames * height * width
