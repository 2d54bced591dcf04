"""Selections that the reroute is made of: the best columns of a row, and the entries that get into each rank.

Both sort keys that carry a position in their low bits, never entries: there are no ties, and the same entries win on a
CPU and on a GPU, which is not waited for.
"""

import numpy as np
import torch
from torch import Tensor

from megatron_anyexperts.moe.quotas import on_host, sort_rows

_KEY_BITS = 63


def best(value_NE: Tensor, count: int) -> Tensor:
    """int64 [N, count], columns of the largest values of each row, best first; of equal ones the first.

    Values count as equal when they agree in the upper ``31 - log2(E)`` bits: to one part in 2**14 for 256 columns.
    """
    mask = (1 << max(1, value_NE.shape[1] - 1).bit_length()) - 1
    column_E = torch.arange(value_NE.shape[1], dtype=torch.int32, device=value_NE.device)
    key_NE = (_ordered(value_NE) & ~mask).bitwise_or_(mask - column_E)
    if on_host(key_NE):  # numpy's vectorised selection takes a tenth of torch's time
        key = key_NE.numpy()
        key.partition(key.shape[1] - count, axis=1)
        key_NK = torch.from_numpy(np.sort(key[:, key.shape[1] - count :], axis=1)[:, ::-1].copy())
    else:
        key_NK = key_NE.topk(count, dim=1).values
    return (mask - (key_NK & mask)).long()


def admit(priority: Tensor, valid: Tensor, rank: Tensor, limit_P: Tensor) -> Tensor:
    """bool, the `limit_P` valid entries of highest priority of each rank; equal priorities by position.

    Args:
        priority: fp32, any shape, any sign, no NaN.
        valid: bool, same shape; entries that compete.
        rank: int64, same shape; whose limit an entry falls under.
        limit_P: int64 >= 0, entries a rank takes.
    """
    ranks, entries = limit_P.shape[0], priority.numel()
    if entries == 0:
        return valid
    position_bits = max(1, (entries - 1).bit_length())
    priority_bits = min(32, _KEY_BITS - position_bits - ranks.bit_length())
    falling = (0x7FFFFFFF - _ordered(priority).long()) >> (32 - priority_bits)
    rank_of = torch.where(valid, rank, ranks)
    position = torch.arange(entries, device=priority.device).view_as(rank)
    shift = position_bits + priority_bits
    key = (rank_of << shift) + (falling << position_bits) + position

    sorted_key = sort_rows(key.view(1, -1))[0]
    start_P = torch.searchsorted(sorted_key, torch.arange(ranks + 1, device=key.device) << shift)
    taken_P = torch.minimum(limit_P, start_P[1:] - start_P[:-1])
    last_P = sorted_key[(start_P[:-1] + taken_P - 1).clamp_min(0)].masked_fill(taken_P == 0, -1)
    return valid & (key <= last_P[rank])


def _ordered(value: Tensor) -> Tensor:
    """int32 of the same order as the fp32 numbers: the bits below the sign of a negative one are flipped."""
    bits = (value.float() + 0.0).contiguous().view(torch.int32)  # -0.0 becomes 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
