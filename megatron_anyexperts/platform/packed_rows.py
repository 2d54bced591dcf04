"""Multi-token prediction over packed rows without waiting for a GPU."""

from __future__ import annotations

import functools

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_token_prediction
from torch import Tensor

from megatron_anyexperts.platform import cut_rows
from megatron_anyexperts.platform.cut_rows import roll_part
from megatron_anyexperts.platform.seams import replace


def roll_left(values: Tensor, borders_N: Tensor) -> Tensor:
    """Shift each sequence of packed rows one place to the left; its last place becomes 0.

    Args:
        values: [..., S].
        borders_N: int, where sequences start, and where the last one ends; places behind that stay as they are.
    """
    size = values.shape[-1]
    ends = torch.zeros(size + 1, dtype=torch.bool, device=values.device)
    ends = ends.index_fill_(0, borders_N.long(), True)[1:]
    rolled = values.roll(-1, -1).masked_fill_(ends, 0)
    behind = torch.arange(size, device=values.device) >= borders_N[-1]
    return torch.where(behind, values, rolled)


def _without_waiting(roll_packed):
    @functools.wraps(roll_packed)
    def wrapper(
        tensor: Tensor,
        shifts: int,
        dims: int,
        packed_seq_params: PackedSeqParams,
        cp_group: torch.distributed.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        if shifts != -1 or dims not in (-1, tensor.dim() - 1):
            raise ValueError(f"shifts={shifts}, dims={dims}: packed rows are rolled by -1 along the last dimension")
        if cp_group is not None and cp_group.size() > 1:
            return roll_part(tensor, packed_seq_params.cu_seqlens_q, cp_group)
        rolled = roll_left(tensor, packed_seq_params.cu_seqlens_q)
        return rolled, rolled.sum()

    return wrapper


def install() -> None:
    """Replace Megatron's roll of packed rows, and its weights where these are cut; repeated calls are harmless."""
    cut_rows.install()
    roll_packed = multi_token_prediction._roll_tensor_packed_seq
    if not hasattr(roll_packed, "__wrapped__"):
        replace(multi_token_prediction.__name__, "_roll_tensor_packed_seq", _without_waiting(roll_packed))
