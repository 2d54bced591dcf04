"""Held-out microbatches and their losses under a trained model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from megatron_anyexperts.data.microbatch import TRAINING_INPUTS, Microbatch
from megatron_anyexperts.data.validation import ValidationLoader
from megatron_anyexperts.training.data import data_settings


def held_out_loader(args: argparse.Namespace, microbatches: int) -> ValidationLoader:
    """The held-out set of a run, for this process.

    Args:
        args: from `trained_model.start`.
        microbatches: of one rank.
    """
    return ValidationLoader(**data_settings(args), micro_batch_size=args.micro_batch_size, microbatches=microbatches)


def held_out_batches(args: argparse.Namespace, microbatches: int) -> Iterator[Microbatch]:
    """Yield the first microbatches of the held-out set on this process's device.

    Args:
        args: from `inference.start`.
        microbatches: how many.
    """
    loader = held_out_loader(args, microbatches)
    device = torch.device(torch.cuda.current_device())
    for _ in range(microbatches):
        yield next(loader).to(device)


def forward(model: torch.nn.Module, batch: Microbatch) -> torch.Tensor:
    """Return the [B, S] losses of one microbatch."""
    with torch.no_grad():
        return model(**batch.select(TRAINING_INPUTS))
