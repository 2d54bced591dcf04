"""Held-out microbatches and their losses under a trained model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

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
