"""Losses of dynamic routing: balance by actual real slots, slot budget, spread of importance; what tokens weigh."""

from __future__ import annotations

import torch
from torch import Tensor

# What a token of a microbatch without targets weighs: next to nothing, and yet it is no padding.
LEAST_WEIGHT = 1e-30


def token_weights(
    padding_BS: Tensor, loss_mask_BS: Tensor | None, group: torch.distributed.ProcessGroup | None = None
) -> Tensor:
    """Return what each token weighs in the router's losses, fp32 [B, S], as the layer's `padding_mask` takes it.

    Padding weighs 0, every other token targets / real tokens of the microbatch: a microbatch then weighs as much as in
    a language-model loss that is summed over its targets.

    Args:
        padding_BS: bool, True for padding.
        loss_mask_BS: float, 1 for targets; None: every token but padding is one.
        group: ranks over which the sequence of the microbatch is split, as context parallelism does; collective.
    """
    real_BS = (~padding_BS).float()
    if loss_mask_BS is None:
        return real_BS
    counts = torch.stack((loss_mask_BS.float().sum(), real_BS.sum()))
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(counts, group=group)
    share = counts[0] / counts[1].clamp(min=1)
    return real_BS * share.clamp(min=LEAST_WEIGHT)


class TokenWeights:
    """Which of the T local tokens take part in a microbatch, and what they weigh in its losses.

    Attributes:
        valid_T: bool; False for padding and for tokens that are not finite.
        weight_T: fp32; positive exactly where valid, over all ranks of a microbatch as many as its targets.
    """

    def __init__(self, weight_T: Tensor, valid_T: Tensor, local_total: Tensor | None = None):
        self.weight_T, self.valid_T = weight_T, valid_T
        self._local_total = local_total
        self._totals: dict[torch.distributed.ProcessGroup, Tensor] = {}

    @classmethod
    def of(cls, mask_SB: Tensor | None, finite_T: Tensor) -> TokenWeights:
        """From the `padding_mask` of a layer and which tokens are finite."""
        if mask_SB is None:
            weight_T = finite_T.float()
        else:
            mask_T = mask_SB.reshape(-1)
            weight_T = ((~mask_T).float() if mask_T.dtype == torch.bool else mask_T.float()) * finite_T
        return cls(weight_T, weight_T > 0)

    def total(self, group: torch.distributed.ProcessGroup) -> Tensor:
        """Return the weight of all ranks of `group` together, fp32 scalar; collective at the first call."""
        if group not in self._totals:
            total = self.weight_T.sum() if self._local_total is None else self._local_total.clone()
            if group.size() > 1:
                torch.distributed.all_reduce(total, group=group)
            self._totals[group] = total
        return self._totals[group]


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
    return _Weighted.apply(scores_TE, share_E * (scores_TE.shape[-1] / tokens.clamp(min=1)).unsqueeze(-1))


class _Weighted(torch.autograd.Function):
    """Sum of scores [T, ..., E] times weights [..., E], mean over what lies between; its gradient is one product."""

    @staticmethod
    def forward(ctx, scores_TE: Tensor, weight_E: Tensor) -> Tensor:
        ctx.save_for_backward(weight_E)
        ctx.shape = scores_TE.shape
        return (scores_TE.sum(0) * weight_E).sum(-1).mean()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (weight_E,) = ctx.saved_tensors
        return (weight_E * (grad / weight_E[..., 0].numel())).expand(ctx.shape), None


def z_loss(logits_TC: Tensor, weights: TokenWeights, group: torch.distributed.ProcessGroup) -> Tensor:
    """Return the local ranks' addend of the mean of logsumexp(logits)^2 over the valid tokens of `group` (ST-MoE)."""
    squares_T = logits_TC.logsumexp(-1).square()
    return (squares_T * weights.weight_T).sum() / weights.total(group).clamp(min=LEAST_WEIGHT)


def shared_mean(sums: Tensor, tokens: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Return means over the tokens of all ranks of `group`, of sums [N] over this rank's; 0 when there are none.

    All ranks get the same value; each one's gradient is that of its own tokens, as for Megatron's balance losses.
    """
    return _SharedMean.apply(sums, tokens, group)


class _SharedMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sums: Tensor, tokens: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        if group.size() > 1:
            both = torch.cat((sums, tokens.view(1)))
            torch.distributed.all_reduce(both, group=group)
            sums, tokens = both[:-1], both[-1]
        count = tokens.clamp(min=1)
        ctx.save_for_backward(count)
        return sums / count

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (count,) = ctx.saved_tensors
        return grad / count, None, None


def budget_loss(mean_soft: Tensor, mean_slots: Tensor, target: float, span: int) -> Tensor:
    """Return ((mean slots - target) / span)^2, measured on integer slots, with the gradient of the continuous ones.

    The integer count is what is computed and what the controller steers; measuring the continuous one instead would
    hold the two apart by the rounding (half a slot with fractional gates).
    """
    return ((mean_slots + (mean_soft - mean_soft.detach()) - target) / span) ** 2


def spread_loss(moments: Tensor, target: float) -> Tensor:
    """Return max(0, 1 - std / target)^2 of a quantity: 1 for a constant, 0 from `target` on.

    Args:
        moments: its mean and the mean of its square, [2].
    """
    return _Spread.apply(moments, target)


class _Spread(torch.autograd.Function):
    """A dozen scalar operators in each direction would be as many launches: the gradient is taken in the first."""

    @staticmethod
    def forward(ctx, moments: Tensor, target: float) -> Tensor:
        mean, mean_square = moments
        variance = mean_square - mean * mean
        # Without the addend the gradient of the root would explode exactly where the loss is needed.
        deviation = (variance.clamp(min=0) + 1e-8).sqrt()
        missing = (1 - deviation / target).clamp(min=0)
        through = torch.where(variance < 0, 0.0, missing / (-target * deviation))
        ctx.save_for_backward(torch.stack((-2 * mean * through, through)))
        return missing * missing

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None
