"""Brings one microbatch from the loader to every rank of a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core import mpu

from megatron_anyexperts.data.microbatch import Microbatch, broadcast


def next_batch(data_iterator: Iterator[Microbatch] | None) -> Microbatch:
    """Read a microbatch on tensor-parallel rank 0 and share it with the group.

    Args:
        data_iterator: of the loader; None on the other ranks.

    Returns:
        the microbatch on this rank's device; without sample keys on the other ranks.
    """
    device = torch.device(torch.cuda.current_device())
    batch = next(data_iterator).to(device) if mpu.get_tensor_model_parallel_rank() == 0 else None
    if mpu.get_tensor_model_parallel_world_size() > 1:
        source = mpu.get_tensor_model_parallel_src_rank()
        batch = broadcast(batch, device, source, mpu.get_tensor_model_parallel_group())
    return batch
