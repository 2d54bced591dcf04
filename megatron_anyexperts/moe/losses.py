"""Losses of dynamic routing: balance by actual real slots, slot budget, spread of importance."""

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


def masked_mean(value_T: Tensor, valid_T: Tensor | None) -> Tensor:
    """Return the mean over valid tokens (None: all), 0 when there are none."""
    if valid_T is None:
        return value_T.mean()
    return (value_T * valid_T).sum() / valid_T.sum().clamp(min=1)


def budget_loss(soft_T: Tensor, slots_T: Tensor, target: float, span: int, valid_T: Tensor | None = None) -> Tensor:
    """Return ((mean slots - target) / span)^2, measured on integer slots, with the gradient of the continuous ones.

    The integer count is what is computed and what the controller steers; measuring `soft_T` instead would hold the
    two apart by the rounding (half a slot with fractional gates).
    """
    straight_T = slots_T + (soft_T - soft_T.detach())
    return ((masked_mean(straight_T, valid_T) - target) / span) ** 2


def spread_loss(importance_T: Tensor, target: float, valid_T: Tensor | None = None) -> Tensor:
    """Return max(0, 1 - std(w) / target)^2: 1 for a constant importance, 0 from a spread of `target` on."""
    mean = masked_mean(importance_T, valid_T)
    variance = masked_mean((importance_T - mean) ** 2, valid_T)
    # Without the addend the gradient of the root would explode exactly where the loss is needed.
    return (1 - (variance + 1e-8).sqrt() / target).clamp(min=0) ** 2
