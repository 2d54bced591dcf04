"""Importance of a token, and its fusion back into the hidden state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_anyexperts.moe.precision import KeepsPrecision

if TYPE_CHECKING:
    from megatron_anyexperts.moe.config import AnyExpertsConfig


class Importance(KeepsPrecision, MegatronModule):
    """Predicts w in (0, 1) per token and fuses it: h' = h + alpha * w * h (AnyExperts paper, arXiv 2511.18314).

    The two-layer form, its bottleneck and fp32 are choices of this project. Parameters stay fp32 in a bf16 or fp16
    model: slot counts depend on small differences of w, which 8 bits of mantissa would merge.

    Stages: hidden [S, B, H] -> bottleneck [T, D], SiLU -> logit [T] -> sigmoid -> w [T]; h' [S, B, H].
    """

    def __init__(self, config: AnyExpertsConfig):
        super().__init__(config)
        width = config.anyexperts_importance_hidden
        self.down = torch.nn.Parameter(self._empty(width, config.hidden_size))
        self.down_bias = torch.nn.Parameter(self._empty(width))
        self.up = torch.nn.Parameter(self._empty(width))
        self.up_bias = torch.nn.Parameter(self._empty(1))
        self.alpha = torch.nn.Parameter(self._empty(1)) if config.anyexperts_learn_alpha else None
        if config.perform_initialization:
            config.init_method(self.down)
            torch.nn.init.normal_(self.up, std=width**-0.5)
            for bias in (self.down_bias, self.up_bias):
                torch.nn.init.zeros_(bias)
        if self.alpha is not None:
            torch.nn.init.constant_(self.alpha, config.anyexperts_alpha)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    @staticmethod
    def _empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=torch.cuda.current_device())

    def kept(self) -> Iterable[Tensor]:
        """Parameters and their gradients."""
        return (tensor for parameter in self.parameters() for tensor in (parameter, parameter.grad))

    def forward(self, hidden_SBH: Tensor) -> tuple[Tensor, Tensor]:
        """Return w, fp32 [T], and h' [S, B, H] in the dtype of the hidden states; h' is h when alpha is fixed at 0."""
        alpha = self.config.anyexperts_alpha if self.alpha is None else self.alpha
        fuses = self.config.anyexperts_fuses
        importance_T, fused_SBH = _ImportanceFusion.apply(
            hidden_SBH, self.down, self.down_bias, self.up, self.up_bias, alpha if fuses else None
        )
        return importance_T, fused_SBH if fuses else hidden_SBH


class _ImportanceFusion(torch.autograd.Function):
    """Both steps as one node of the graph.

    Autograd would keep an fp32 copy of the hidden states for the bottleneck and walk over [T, H] seven times in the
    backward pass; this keeps the hidden states as they are and walks over them four times.
    """

    @staticmethod
    def forward(ctx, hidden_SBH, down, down_bias, up, up_bias, alpha):
        hidden_TH = hidden_SBH.reshape(-1, hidden_SBH.shape[-1])
        inner_TD = torch.addmm(down_bias, hidden_TH.to(down.dtype), down.t())
        importance_T = torch.addmv(up_bias.expand(len(inner_TD)), torch.nn.functional.silu(inner_TD), up).sigmoid_()
        fused_TH = None
        if alpha is not None:
            fused_TH = torch.addcmul(hidden_TH, hidden_TH, (alpha * importance_T).to(hidden_TH.dtype).unsqueeze(1))
        ctx.alpha = alpha if not isinstance(alpha, Tensor) else None
        learned = alpha if isinstance(alpha, Tensor) else None
        ctx.save_for_backward(hidden_SBH, down, up, inner_TD, importance_T, learned)
        return importance_T, None if fused_TH is None else fused_TH.view_as(hidden_SBH)

    @staticmethod
    def backward(ctx, grad_importance_T, grad_fused_SBH):
        hidden_SBH, down, up, inner_TD, importance_T, learned = ctx.saved_tensors
        alpha = learned if learned is not None else ctx.alpha
        hidden_TH = hidden_SBH.reshape(-1, hidden_SBH.shape[-1])
        grad_alpha, grad_TH = None, None
        if grad_importance_T is None:
            grad_importance_T = torch.zeros_like(importance_T)
        if alpha is not None and grad_fused_SBH is not None:
            grad_fused_TH = grad_fused_SBH.reshape(hidden_TH.shape)
            scale_T = (alpha * importance_T).to(hidden_TH.dtype)
            grad_scale_T = (grad_fused_TH * hidden_TH).sum(1, dtype=importance_T.dtype)
            grad_importance_T = grad_importance_T + alpha * grad_scale_T
            if learned is not None:
                grad_alpha = (importance_T * grad_scale_T).sum().view_as(learned)
            grad_TH = torch.addcmul(grad_fused_TH, grad_fused_TH, scale_T.unsqueeze(1))
        grad_logit_T = grad_importance_T * importance_T * (1 - importance_T)
        gate_TD = inner_TD.sigmoid()
        active_TD = inner_TD * gate_TD
        # d silu(x) = g + x g (1 - g) with g = sigmoid(x)
        grad_inner_TD = torch.addcmul(gate_TD, active_TD, 1 - gate_TD) * grad_logit_T.unsqueeze(1) * up
        grad_down = grad_inner_TD.t() @ hidden_TH.to(down.dtype)
        through_TH = grad_inner_TD.to(hidden_TH.dtype), down.to(hidden_TH.dtype)
        grad_TH = torch.mm(*through_TH) if grad_TH is None else grad_TH.addmm_(*through_TH)
        return (
            grad_TH.view_as(hidden_SBH),
            grad_down,
            grad_inner_TD.sum(0),
            active_TD.t() @ grad_logit_T,
            grad_logit_T.sum().view(1),
            grad_alpha,
        )


class CentredGradient(torch.autograd.Function):
    """Importance as it is; backward, its gradient less the mean over the tokens that take part.

    The controller of the slot offset cancels whatever all tokens share, so without centring a token with a small
    gradient drifts against one with a large one, whatever their signs. The mean acts as the price of a slot.
    """

    @staticmethod
    def forward(ctx, importance_T: Tensor, valid_T: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        """Return importance.

        Args:
            importance_T: fp32 [T].
            valid_T: bool [T], the tokens that take part; the others get no gradient.
            group: ranks that hold the tokens of one microbatch.
        """
        ctx.save_for_backward(valid_T)
        ctx.group = group
        return importance_T.view_as(importance_T)

    @staticmethod
    def backward(ctx, grad_T: Tensor) -> tuple[Tensor, None, None]:
        (valid_T,) = ctx.saved_tensors
        grad_T = grad_T * valid_T
        sums_2 = torch.stack((grad_T.sum(), valid_T.sum().to(grad_T.dtype)))
        if ctx.group.size() > 1:
            torch.distributed.all_reduce(sums_2, group=ctx.group)
        return (grad_T - sums_2[0] / sums_2[1].clamp(min=1)) * valid_T, None, None
