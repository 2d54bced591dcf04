"""Multi-token prediction over packed rows that are cut over context-parallel ranks (see `row_cut`)."""

from __future__ import annotations

import copy
import functools

import torch
from megatron.core.models.hybrid import hybrid_model
from torch import Tensor

from megatron_anyexperts.platform.seams import replace


def cut_places(borders_N: Tensor, size: int, ranks: int) -> Tensor:
    """`row_cut.held_places` from borders on a device, int64 [ranks, size], without waiting for it.

    Args:
        borders_N: int, where the sequences of the whole row start, and its end, ranks * size.
        size: of a rank's part.
    """
    borders_N = borders_N.long()
    part_S = torch.arange(size, device=borders_N.device)
    document_S = torch.searchsorted(borders_N[1:] // ranks, part_S, right=True)
    start_S, chunk_S = borders_N[document_S], borders_N.diff()[document_S] // (2 * ranks)
    offset_S = part_S - start_S // ranks
    rank_R1 = torch.arange(ranks, device=borders_N.device)[:, None]
    late_RS = (2 * ranks - 1 - rank_R1) * chunk_S + offset_S - chunk_S
    return start_S + torch.where(offset_S < chunk_S, rank_R1 * chunk_S + offset_S, late_RS)


def roll_cut(parts_RBS: Tensor, borders_N: Tensor) -> Tensor:
    """Shift each sequence of a cut row one place to the left; its last place becomes 0.

    Args:
        parts_RBS: the parts of all ranks.
        borders_N: see `cut_places`.
    """
    ranks, _, size = parts_RBS.shape
    places = cut_places(borders_N, size, ranks).flatten()
    where = torch.empty_like(places).index_copy_(0, places, torch.arange(len(places), device=places.device))
    ends = torch.zeros(len(places) + 1, dtype=torch.bool, device=places.device)
    ends = ends.index_fill_(0, borders_N.long(), True)[places + 1]
    following = where[(places + 1).clamp(max=len(places) - 1)]
    whole_BX = parts_RBS.transpose(0, 1).flatten(1)
    return whole_BX[:, following].masked_fill(ends, 0).unflatten(1, (ranks, size)).transpose(0, 1)


def roll_part(values_BS: Tensor, borders_N: Tensor, group: torch.distributed.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Roll this rank's part of a row.

    Returns:
        The part, and the sum of the whole row divided by the ranks: what each rank divides its own sum by, so that the
        mean over ranks is the whole row's.
    """
    rows, size = values_BS.shape
    gathered = values_BS.new_empty(group.size() * rows, size)
    torch.distributed.all_gather_into_tensor(gathered, values_BS.contiguous(), group=group)
    rolled_RBS = roll_cut(gathered.view(-1, rows, size), borders_N)
    return rolled_RBS[group.rank()].contiguous(), rolled_RBS.sum() / group.size()


def _weighed_by_whole_rows(process_mtp_loss):
    @functools.wraps(process_mtp_loss)
    def wrapper(*args, config, loss_mask, cp_group=None, **named):
        if cp_group is not None and cp_group.size() > 1 and config.calculate_per_token_loss:
            targets = loss_mask.sum(dtype=torch.float32)
            torch.distributed.all_reduce(targets, group=cp_group)
            # What Megatron does without a loss per token divides by the count of the roll, which is the whole row's.
            config = copy.copy(config)
            config.calculate_per_token_loss = False
            config.mtp_loss_scaling_factor = config.mtp_loss_scaling_factor * targets / cp_group.size()
        return process_mtp_loss(*args, config=config, loss_mask=loss_mask, cp_group=cp_group, **named)

    return wrapper


def install() -> None:
    """Weigh prediction losses by the targets of whole rows; repeated calls are harmless.

    Megatron-Core 0.19.2 weighs those of a context-parallel rank by the targets of that rank alone.
    """
    process = hybrid_model.process_mtp_loss
    if not hasattr(process, "__wrapped__"):
        replace(hybrid_model.__name__, "process_mtp_loss", _weighed_by_whole_rows(process))
