"""Norms, rotary positions and causal attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_anyexperts import AnyExpertsConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32; `heads` of them together where given."""

    def __init__(self, size: int, eps: float, heads: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size * heads))
        self.eps, self.together = eps, heads > 1

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(-2) if self.together else x
        normed = functional.rms_norm(flat.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
        return normed.view_as(x)


class Rotary:
    """Rotary positions, scaled or not; holds no tensor of the model."""

    def __init__(self, config: AnyExpertsConfig):
        self.config = config

    def __call__(self, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [B, S, rotated width]."""
        settings = self.config.rope_parameters
        kind, scale = settings.get("rope_type", "default"), 1.0
        if kind == "default":
            width = int(self.config.head_dim * settings.get("partial_rotary_factor", 1.0))
            steps = torch.arange(0, width, 2, dtype=torch.float32, device=positions_BS.device)
            frequencies = 1.0 / (settings["rope_theta"] ** (steps / width))
        else:
            frequencies, scale = ROPE_INIT_FUNCTIONS[kind](self.config, positions_BS.device)
        angles = positions_BS.unsqueeze(-1).float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(x_BNSD: Tensor, cos_BSR: Tensor, sin_BSR: Tensor) -> Tensor:
    """Turn the first R values of each head."""
    width = cos_BSR.shape[-1]
    turned, rest = x_BNSD[..., :width], x_BNSD[..., width:]
    first, second = turned.chunk(2, dim=-1)
    half = torch.cat((-second, first), dim=-1)
    return torch.cat((turned * cos_BSR.unsqueeze(1) + half * sin_BSR.unsqueeze(1), rest), dim=-1)


class Attention(nn.Module):
    """Causal attention with grouped queries; queries, key and value of a group are neighbours in one matrix."""

    is_causal = True

    def __init__(self, config: AnyExpertsConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_key_value_groups, self.scaling = heads // groups, width**-0.5
        self.qkv_proj = nn.Linear(config.hidden_size, (heads + 2 * groups) * width, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=False)
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            together = config.qk_norm == "all"
            self.q_norm = RMSNorm(width, config.rms_norm_eps, heads if together else 1)
            self.k_norm = RMSNorm(width, config.rms_norm_eps, groups if together else 1)

    def forward(
        self, hidden_BSH: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None, **kwargs
    ) -> Tensor:
        config, shape = self.config, hidden_BSH.shape[:2]
        grouped = self.qkv_proj(hidden_BSH).view(*shape, config.num_key_value_heads, -1, config.head_dim)
        query, key, value = grouped.split((self.num_key_value_groups, 1, 1), dim=3)
        query, key, value = query.flatten(2, 3), key.squeeze(3), value.squeeze(3)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        query, key = rotate(query, *rotation), rotate(key, *rotation)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        return self.o_proj(attend(self, query, key, value, mask, **kwargs))


class LatentAttention(nn.Module):
    """Multi-latent attention (DeepSeek-V2 and V3); the cache holds keys and values of all heads."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: AnyExpertsConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        hidden, heads, rotated = config.hidden_size, config.num_attention_heads, config.head_dim
        rank, plain, value = (config.latent[name] for name in ("rank", "plain", "value"))
        query_rank, self.scaling = config.latent["query_rank"], config.latent["scaling"]
        self.q_proj = self.q_down_proj = self.q_up_proj = self.q_norm = self.kv_norm = None
        if query_rank is None:
            self.q_proj = nn.Linear(hidden, heads * (plain + rotated), bias=False)
        else:
            self.q_down_proj = nn.Linear(hidden, query_rank, bias=False)
            self.q_up_proj = nn.Linear(query_rank, heads * (plain + rotated), bias=False)
        self.kv_down_proj = nn.Linear(hidden, rank + rotated, bias=False)
        self.kv_up_proj = nn.Linear(rank, heads * (plain + value), bias=False)
        self.o_proj = nn.Linear(heads * value, hidden, bias=False)
        if config.qk_norm != "none":
            self.q_norm = None if query_rank is None else RMSNorm(query_rank, config.rms_norm_eps)
            self.kv_norm = RMSNorm(rank, config.rms_norm_eps)

    def forward(
        self, hidden_BSH: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None, **kwargs
    ) -> Tensor:
        heads, rotated, plain = self.config.num_attention_heads, self.config.head_dim, self.config.latent["plain"]
        if self.q_proj is not None:
            query = self.q_proj(hidden_BSH)
        else:
            latent = self.q_down_proj(hidden_BSH)
            query = self.q_up_proj(latent if self.q_norm is None else self.q_norm(latent))
        query, query_turned = self._by_head(query, heads).split((plain, rotated), dim=-1)
        latent, key_turned = self.kv_down_proj(hidden_BSH).split((self.config.latent["rank"], rotated), dim=-1)
        expanded = self._by_head(self.kv_up_proj(latent if self.kv_norm is None else self.kv_norm(latent)), heads)
        key, value = expanded.split((plain, expanded.shape[-1] - plain), dim=-1)
        query_turned = rotate(_pairs_apart(query_turned), *rotation)
        key_turned = rotate(_pairs_apart(key_turned.unsqueeze(1)), *rotation).expand(-1, heads, -1, -1)
        query, key = torch.cat((query, query_turned), dim=-1), torch.cat((key, key_turned), dim=-1)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        return self.o_proj(attend(self, query, key, value, mask, **kwargs))

    @staticmethod
    def _by_head(x_BSC: Tensor, heads: int) -> Tensor:
        return x_BSC.unflatten(-1, (heads, -1)).transpose(1, 2)


def _pairs_apart(x: Tensor) -> Tensor:
    """Values that turn together are neighbours in the weights, and half the width apart in `rotate`."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs) -> Tensor:
    """The chosen implementation of attention: [B, heads, S, D] each, the result [B, S, heads * D]."""
    chosen = ALL_ATTENTION_FUNCTIONS.get(module.config._attn_implementation, eager_attention)
    context, _ = chosen(module, query, key, value, mask, dropout=0.0, scaling=module.scaling, **kwargs)
    return context.reshape(*context.shape[:2], -1)


def eager_attention(module: nn.Module, query, key, value, mask, scaling: float, **_) -> tuple[Tensor, Tensor]:
    """Attention with its weights; all [B, heads, S, D], the result [B, S, heads, D]."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights
