"""RMSNorm in plain torch, for the spec that runs without Transformer Engine."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square layer norm over the last dimension, computed in fp32.

    Megatron's own torch norm refuses sequence parallelism. Here the weight is marked instead, so that its gradient
    is summed over the tensor-parallel ranks, each of which sees a part of the sequence (for the norms of queries
    and keys: a part of the heads).

    Args:
        config: Megatron configuration; `sequence_parallel`, `layernorm_zero_centered_gamma` and `params_dtype` count.
        hidden_size: size of the last dimension.
        eps: added to the mean of squares.

    Raises:
        ValueError: the configuration asks for a norm other than RMSNorm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        if config.normalization != "RMSNorm":
            raise ValueError(
                f"normalization={config.normalization}: the local spec has RMSNorm only; pass --normalization RMSNorm"
            )
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        fill = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(fill(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x [..., hidden_size]`; the result has the dtype of `x`."""
        weight = self.weight.float()
        if self.zero_centered:
            weight = weight + 1
        return torch.nn.functional.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


class AllHeadsRMSNorm(RMSNorm):
    """RMSNorm of queries or keys over all heads together, as in OLMoE, instead of over each head.

    Args:
        config: see `RMSNorm`.
        hidden_size: width of a head.
        eps: added to the mean of squares.
        heads: number of heads.

    Raises:
        ValueError: tensor parallelism, under which no rank has all heads.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, heads: int):
        if config.tensor_model_parallel_size > 1:
            raise ValueError(
                f"tensor_model_parallel_size={config.tensor_model_parallel_size} with qk_norm_all_heads: the norm is "
                "over all heads, and a rank has some of them; use expert or pipeline parallelism"
            )
        super().__init__(config, hidden_size * heads, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x [..., heads, hidden_size]`; the result has the dtype of `x`."""
        return super().forward(x.flatten(-2)).view_as(x)
