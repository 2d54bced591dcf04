"""Importance of a token, and its fusion back into the hidden state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

if TYPE_CHECKING:
    from megatron_anyexperts.config import AnyExpertsConfig


class Importance(MegatronModule):
    """Predicts w in (0, 1) per token and fuses it: h' = h + alpha * w * h (AnyExperts paper, arXiv 2511.18314).

    The two-layer form, its bottleneck and fp32 are choices of this project. Parameters stay fp32 in a bf16 or fp16
    model: slot counts depend on small differences of w, which 8 bits of mantissa would merge.

    Stages: hidden [S, B, H] -> bottleneck [T, D], SiLU -> logit [T] -> sigmoid -> w [T].
    """

    def __init__(self, config: AnyExpertsConfig):
        super().__init__(config)
        width = config.anyexperts_importance_hidden
        self.down = torch.nn.Parameter(self._empty(width, config.hidden_size))
        self.down_bias = torch.nn.Parameter(self._empty(width))
        self.up = torch.nn.Parameter(self._empty(width))
        self.up_bias = torch.nn.Parameter(self._empty(1))
        if config.anyexperts_learn_alpha:
            self.alpha = torch.nn.Parameter(self._empty(1))
        else:
            self.alpha = config.anyexperts_alpha
        if config.perform_initialization:
            config.init_method(self.down)
            torch.nn.init.normal_(self.up, std=width**-0.5)
            for bias in (self.down_bias, self.up_bias):
                torch.nn.init.zeros_(bias)
        if config.anyexperts_learn_alpha:
            torch.nn.init.constant_(self.alpha, config.anyexperts_alpha)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    @staticmethod
    def _empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=torch.cuda.current_device())

    def _apply(self, fn, recurse=True):
        def keep_fp32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_fp32, recurse)

    def forward(self, hidden_SBH: Tensor) -> Tensor:
        """Return w in (0, 1), fp32 [T], of hidden states [S, B, H]."""
        hidden_TH = hidden_SBH.reshape(-1, hidden_SBH.shape[-1])
        with torch.autocast(hidden_TH.device.type, enabled=False):
            inner_TD = torch.nn.functional.silu(torch.addmm(self.down_bias, hidden_TH.float(), self.down.t()))
            return torch.sigmoid(torch.mv(inner_TD, self.up) + self.up_bias)

    def fuse(self, hidden_SBH: Tensor, importance_T: Tensor) -> Tensor:
        """Return h + alpha * w * h in the dtype of h; h itself when alpha is fixed at 0."""
        if not self.config.anyexperts_fuses:
            return hidden_SBH
        scale = (self.alpha * importance_T).to(hidden_SBH.dtype).view(*hidden_SBH.shape[:-1], 1)
        return torch.addcmul(hidden_SBH, hidden_SBH, scale)
