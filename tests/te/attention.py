"""Stands for the kernels of attention and rotary positions, with the checks of what they take."""

import torch
from torch.nn.functional import scaled_dot_product_attention


def get_attention_backend(_parameters):
    """Flash attention of any version, and nothing else."""
    return True, None, False, None, False, [True, False, False]


class ReferenceAttention(torch.nn.Module):
    """torch's attention for each document of a packed row (`thd`), or for rows side by side (`sbhd`)."""

    def __init__(self, softmax_scale, attention_dropout=0.0, **_):
        super().__init__()
        if attention_dropout:
            raise NotImplementedError("the reference knows no dropout in attention")
        self.softmax_scale = softmax_scale

    def forward(self, query, key, value, *, qkv_layout, attn_mask_type, **others):
        """[T, N, D] or [S, B, N, D] each -> [T, N * D] or [S, B, N * D]."""
        if query.dtype not in (torch.float16, torch.bfloat16) or not query.dtype == key.dtype == value.dtype:
            raise TypeError(f"attention of {query.dtype}, {key.dtype}, {value.dtype}: kernels take fp16 or bf16")
        if others.get("window_size") not in (None, (-1, -1), (-1, 0)):
            raise NotImplementedError(f"window_size={others['window_size']}")
        if qkv_layout.startswith("t"):
            borders = self._borders(others, query, key)
            pieces = [
                self._attend(query[start:end], key[start:end], value[start:end], attn_mask_type)
                for start, end in zip(borders, borders[1:], strict=False)
                if end > start
            ]
            return torch.cat(pieces).flatten(-2)
        if not qkv_layout.startswith("sb"):
            raise NotImplementedError(f"qkv_layout={qkv_layout}")
        return self._attend(query, key, value, attn_mask_type).flatten(-2)

    @staticmethod
    def _borders(others, query, key) -> list[int]:
        """Where documents end; a kernel reads past a tensor, or leaves rows unwritten, where these are wrong."""
        borders, of_keys = others["cu_seqlens_q"], others["cu_seqlens_kv"]
        if borders.dtype != torch.int32 or not torch.equal(borders, of_keys):
            raise ValueError(f"borders {borders}, {of_keys}")
        lengths = borders.diff()
        if borders[0] != 0 or borders[-1] != len(query) or len(query) != len(key) or (lengths < 0).any():
            raise ValueError(f"borders {borders.tolist()} of {len(query)} rows")
        if not int(lengths.max()) <= min(others["max_seqlen_q"], others["max_seqlen_kv"]):
            raise ValueError(f"max_seqlen={others['max_seqlen_q']} with a document of {int(lengths.max())}")
        return borders.tolist()

    def _attend(self, query, key, value, mask_type: str) -> torch.Tensor:
        causal = "causal" in mask_type
        if causal and len(query) != len(key):
            raise NotImplementedError(f"{mask_type} attention of {len(query)} queries and {len(key)} keys")
        query, key, value = (x.movedim(0, -2) for x in (query, key, value))
        attended = scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=self.softmax_scale, enable_gqa=query.size(-3) != key.size(-3)
        )
        return attended.movedim(-2, 0)


def fused_rope_forward(x, freqs, starts, layout, interleaved, borders, cp_size, _cp_rank):
    """Turn `x [T, N, D]` or `[S, B, N, D]` by fp32 angles `freqs [P, 1, 1, R]`, counted from each document's start."""
    if starts is not None or interleaved or cp_size > 1:
        raise NotImplementedError("the reference turns halves, from position 0, on one context-parallel rank")
    angles = freqs.flatten(1)
    if layout.name == "NVTE_THD":
        angles = torch.cat([angles[:length] for length in borders.diff().tolist()])[:, None]
    elif layout.name == "NVTE_SBHD":
        angles = angles[: len(x), None, None]
    else:
        raise NotImplementedError(f"{layout}")
    turned, rest = x[..., : angles.size(-1)].float(), x[..., angles.size(-1) :]
    first, second = turned.chunk(2, -1)
    turned = turned * angles.cos() + torch.cat((-second, first), -1) * angles.sin()
    return torch.cat((turned.to(x.dtype), rest), -1)


def fused_rope_backward(grad, freqs, *others):
    """Turn back."""
    return fused_rope_forward(grad, -freqs, *others)


OPERATORS = {
    "flash_attention": ReferenceAttention,
    "get_attention_backend": get_attention_backend,
    "fused_rope_forward": fused_rope_forward,
    "fused_rope_backward": fused_rope_backward,
}
