"""Losses of dynamic routing: balance by actual real slots, slot budget, spread of importance."""

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor


def balance_loss(scores_TE: Tensor, counts_E: Tensor, tokens: Tensor) -> Tensor:
    """Switch-style loss E * sum_e f_e * P_e with loads from the slots in use; 1 when both are uniform.

    Like Megatron's `switch_load_balancing_loss_func`, except that the share f_e is divided by the real slots counted
    instead of top-k * tokens.

    Args:
        scores_TE: normalised scores of the local tokens, 0 in padding; differentiable. [S, B, E] for one loss
            per sequence.
        counts_E: real slots per expert over all ranks that share the loss; [B, E] for one loss per sequence.
        tokens: valid tokens over those ranks, scalar; [B] for one loss per sequence.

    Returns:
        The local ranks' addend: summed over the ranks it is the loss; a scalar, the mean over sequences.
    """
    share_E = counts_E / counts_E.sum(-1, keepdim=True).clamp(min=1)
    per_sequence = (scores_TE.sum(0) * share_E).sum(-1) * scores_TE.shape[-1] / tokens.clamp(min=1)
    return per_sequence.mean()


def shared_mean(values_NT: Tensor, valid_T: Tensor | None, group: torch.distributed.ProcessGroup) -> Tensor:
    """Return the means [N] over the valid tokens (None: all) of all ranks of `group`; 0 when there are none.

    All ranks get the same value; each one's gradient is that of its own tokens, as for Megatron's balance losses.
    """
    valid_T = torch.ones_like(values_NT[0]) if valid_T is None else valid_T.to(values_NT.dtype)
    sums = torch.cat((values_NT @ valid_T, valid_T.sum().unsqueeze(0)))
    sums = reduce_from_tensor_model_parallel_region(sums, group=group)
    return sums[:-1] / sums[-1].clamp(min=1)


def budget_loss(mean_soft: Tensor, mean_slots: Tensor, target: float, span: int) -> Tensor:
    """Return ((mean slots - target) / span)^2, measured on integer slots, with the gradient of the continuous ones.

    The integer count is what is computed and what the controller steers; measuring the continuous one instead would
    hold the two apart by the rounding (half a slot with fractional gates).
    """
    return ((mean_slots + (mean_soft - mean_soft.detach()) - target) / span) ** 2


def spread_loss(mean: Tensor, mean_square: Tensor, target: float) -> Tensor:
    """Return max(0, 1 - std / target)^2 of a quantity with these moments: 1 for a constant, 0 from `target` on."""
    # Without the addend the gradient of the root would explode exactly where the loss is needed.
    deviation = ((mean_square - mean**2).clamp(min=0) + 1e-8).sqrt()
    return (1 - deviation / target).clamp(min=0) ** 2
