"""Brings one microbatch from the loader to every rank of a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import mpu

# Tensors of a microbatch, in the order in which they are broadcast. B rows of S tokens; P patches of N images or
# frames; F log-mel frames of M clips.
TENSORS: dict[str, torch.dtype] = {
    "tokens": torch.int64,  # [B, S]
    "labels": torch.int64,  # [B, S], shifted: the label of a position is the next token of its document
    "loss_mask": torch.float32,  # [B, S]
    "position_ids": torch.int64,  # [B, S], restarts in each document
    "segment_ids": torch.int32,  # [B, S], document number within the row, 0 for padding
    "token_modality": torch.int8,  # [B, S]
    "sample_modality": torch.int8,  # [B, S]
    "image_patches": torch.float32,  # [P, 3 * patch_size**2]
    "image_grids": torch.int32,  # [N, 3] (frames, height, width) in patches
    "audio_features": torch.float32,  # [F, n_mels]
    "audio_lengths": torch.int32,  # [M] frames
}


def _broadcast(batch: dict[str, torch.Tensor] | None, device: torch.device) -> dict[str, torch.Tensor]:
    """Send the tensors of tensor-parallel rank 0 to its group: one message of shapes, then one per tensor."""
    group, source = mpu.get_tensor_model_parallel_group(), mpu.get_tensor_model_parallel_src_rank()
    shapes = torch.full((len(TENSORS), 2), -1, dtype=torch.int64, device=device)
    if batch is not None:
        for row, name in enumerate(TENSORS):
            shapes[row, : batch[name].dim()] = torch.tensor(batch[name].shape, device=device)
    torch.distributed.broadcast(shapes, source, group=group)
    received = {}
    for (name, dtype), shape in zip(TENSORS.items(), shapes.tolist(), strict=True):
        size = [length for length in shape if length >= 0]
        tensor = batch[name] if batch is not None else torch.empty(size, dtype=dtype, device=device)
        if tensor.numel():
            torch.distributed.broadcast(tensor, source, group=group)
        received[name] = tensor
    return received


def next_batch(data_iterator: Iterator[dict[str, Any]] | None) -> dict[str, Any]:
    """Read a microbatch on tensor-parallel rank 0 and share it with the group.

    Args:
        data_iterator: yields microbatches with the tensors of `TENSORS` and ``sample_keys``; None on the other ranks.

    Returns:
        the tensors on this rank's device, and ``sample_keys`` (empty on the other ranks).
    """
    device = torch.device(torch.cuda.current_device())
    batch, keys = None, []
    if mpu.get_tensor_model_parallel_rank() == 0:
        loaded = next(data_iterator)
        keys = loaded["sample_keys"]
        batch = {
            name: loaded[name].to(device=device, dtype=dtype, non_blocking=True).contiguous()
            for name, dtype in TENSORS.items()
        }
    if mpu.get_tensor_model_parallel_world_size() > 1:
        batch = _broadcast(batch, device)
    return {**batch, "sample_keys": keys}
