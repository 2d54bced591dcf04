"""Brings one microbatch from the loader to every rank of a tensor-parallel group: its part, where rows are cut."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import torch
from megatron.core import mpu
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.training import get_args

from megatron_anyexperts.data.context_cut import cut
from megatron_anyexperts.data.microbatch import Microbatch, broadcast
from megatron_anyexperts.media import MediaShape


def next_batch(data_iterator: Iterator[Microbatch] | None, shape: MediaShape) -> Microbatch:
    """Read a microbatch on tensor-parallel rank 0 and share it with the group.

    All context-parallel ranks read the same one, and each keeps its part.

    Args:
        data_iterator: of the loader; None on the other ranks.
        shape: media geometry.

    Returns:
        the microbatch on this rank's device; without sample keys on the other ranks.
    """
    device = torch.device(torch.cuda.current_device())
    batch = None
    if mpu.get_tensor_model_parallel_rank() == 0:
        batch = next(data_iterator)
        if (ranks := mpu.get_context_parallel_world_size()) > 1:
            batch = cut(batch, mpu.get_context_parallel_rank(), ranks, shape, part_multiple(get_args()))
        batch = batch.to(device)
    if mpu.get_tensor_model_parallel_world_size() > 1:
        source = mpu.get_tensor_model_parallel_src_rank()
        batch = broadcast(batch, device, source, mpu.get_tensor_model_parallel_group())
    return batch


def part_multiple(args: argparse.Namespace) -> int:
    """What the length of a rank's part of a row has to be a multiple of."""
    tensor = args.tensor_model_parallel_size if args.sequence_parallel else 1
    return math.lcm(tensor, get_fp8_align_size(args.fp8_recipe) if args.fp8 else 1)
