"""Encoders of pictures, video and sound, and their projectors into the decoder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from .attention_anyexperts import RMSNorm

_FREQUENCIES = 16
_LONGEST_WAVE = 10_000.0


class MLP(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, inputs: int, inner: int, outputs: int):
        super().__init__()
        self.up_proj = nn.Linear(inputs, inner, bias=False)
        self.down_proj = nn.Linear(inner, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.gelu(self.up_proj(x)))


class Attention(nn.Module):
    """Attention in both directions, inside each sequence."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(hidden, 3 * hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x_NLH: Tensor, real_NL: Tensor) -> Tensor:
        by_head = self.qkv_proj(x_NLH).view(*x_NLH.shape[:2], self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        context = functional.scaled_dot_product_attention(*by_head, attn_mask=real_NL[:, None, None, :])
        return self.o_proj(context.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """x + f(norm(x)) with attention or an MLP for f."""

    def __init__(self, sizes: dict[str, Any], eps: float, attends: bool):
        super().__init__()
        hidden = sizes["hidden_size"]
        self.norm = RMSNorm(hidden, eps)
        self.self_attn = Attention(hidden, sizes["num_heads"]) if attends else None
        self.mlp = None if attends else MLP(hidden, sizes["ffn_hidden_size"], hidden)

    def forward(self, x_NLH: Tensor, real_NL: Tensor) -> Tensor:
        normed = self.norm(x_NLH)
        return x_NLH + (self.mlp(normed) if self.self_attn is None else self.self_attn(normed, real_NL))


class Encoder(nn.Module):
    """A transformer over sequences laid end to end, and a projector of `merge` neighbours each."""

    def __init__(self, sizes: dict[str, Any], eps: float, axes: int, merge: int, output: int):
        super().__init__()
        hidden = sizes["hidden_size"]
        self.positions = nn.Module()
        self.positions.project = nn.Linear(axes * 2 * _FREQUENCIES, hidden, bias=False)
        self.layers = nn.ModuleList(Layer(sizes, eps, not place % 2) for place in range(2 * sizes["num_layers"]))
        self.norm = RMSNorm(hidden, eps)
        self.projector = MLP(merge * hidden, output, output)

    def embed_positions(self, positions_PA: Tensor) -> Tensor:
        """Sines and cosines of integer positions [P, axes], mapped to [P, H]."""
        exponents = torch.arange(_FREQUENCIES, device=positions_PA.device) / _FREQUENCIES
        angles = positions_PA.unsqueeze(-1) * _LONGEST_WAVE**-exponents
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
        return self.positions.project(waves.to(self.positions.project.weight.dtype))

    def transform(self, x_PH: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """The sequences of `lengths` (sum P), encoded, each [L, H]."""
        x_NLH = pad_sequence(x_PH.split(list(lengths)), batch_first=True)
        ends_N1 = torch.tensor(lengths, device=x_PH.device).unsqueeze(1)
        real_NL = torch.arange(x_NLH.shape[1], device=x_PH.device) < ends_N1
        for layer in self.layers:
            x_NLH = layer(x_NLH, real_NL)
        return [row[:length] for row, length in zip(self.norm(x_NLH), lengths, strict=True)]


class VisionEncoder(Encoder):
    """Patches of pictures and videos in their own resolution to features, one row a placeholder."""

    def __init__(self, sizes: dict[str, Any], eps: float, output: int):
        merge = sizes["spatial_merge"]
        super().__init__(sizes, eps, 3, merge**2, output)
        self.merge = merge
        self.embed = nn.Linear(3 * sizes["patch_size"] ** 2, sizes["hidden_size"], bias=False)

    def forward(self, patches_PD: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        """Encode row-major (t, h, w) patches of all pictures, one behind the other, into [tokens, H].

        Raises:
            ValueError: the grids do not cover the patches.
        """
        covered = sum(t * h * w for t, h, w in grids)
        if covered != len(patches_PD):
            raise ValueError(f"image_grids describe {covered} patches, image_patches holds {len(patches_PD)}")
        order_P, positions_P3, lengths = self._layout(grids)
        order_P, positions_P3 = order_P.to(patches_PD.device), positions_P3.to(patches_PD.device)
        x_PH = self.embed(patches_PD[order_P].to(self.embed.weight.dtype)) + self.embed_positions(positions_P3)
        x_PH = torch.cat(self.transform(x_PH, lengths))
        return self.projector(x_PH.reshape(len(x_PH) // self.merge**2, -1))

    def _layout(self, grids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, list[int]]:
        """Order in which the patches of a token are neighbours, (t, row, column) in it, and patches of each frame."""
        orders, positions, lengths, start = [], [], [], 0
        for t, h, w in grids:
            grid = torch.arange(t * h * w).view(t, h // self.merge, self.merge, w // self.merge, self.merge)
            order = grid.transpose(2, 3).flatten()
            orders.append(order + start)
            positions.append(torch.stack([order // (h * w), order // w % h, order % w], dim=1))
            lengths += [h * w] * t
            start += t * h * w
        return torch.cat(orders), torch.cat(positions), lengths


class AudioEncoder(Encoder):
    """Log-mel frames of clips to features, one row a placeholder."""

    def __init__(self, sizes: dict[str, Any], eps: float, output: int):
        merge = sizes["audio_stride"] // 2
        super().__init__(sizes, eps, 1, merge, output)
        self.merge, hidden = merge, sizes["hidden_size"]
        self.front_end = nn.Module()
        self.front_end.conv1 = nn.Linear(3 * sizes["n_mels"], hidden, bias=False)
        self.front_end.conv2 = nn.Linear(3 * hidden, hidden, bias=False)

    def forward(self, mels_FC: Tensor, lengths: Sequence[int]) -> Tensor:
        """Encode the frames of all clips, one clip behind the other, into [tokens, H].

        Raises:
            ValueError: the lengths do not add up to the frames.
        """
        if sum(lengths) != len(mels_FC):
            raise ValueError(f"audio_lengths add up to {sum(lengths)} frames, audio_features holds {len(mels_FC)}")
        clips = [self._convolve(clip) for clip in mels_FC.to(self.front_end.conv1.weight.dtype).split(list(lengths))]
        halved = [len(clip) for clip in clips]
        steps_P1 = torch.cat([torch.arange(length) for length in halved]).unsqueeze(1).to(mels_FC.device)
        encoded = self.transform(torch.cat(clips) + self.embed_positions(steps_P1), halved)
        filled = [functional.pad(x_LH, (0, 0, 0, -len(x_LH) % self.merge)) for x_LH in encoded]
        return self.projector(torch.cat([x_LH.reshape(len(x_LH) // self.merge, -1) for x_LH in filled]))

    def _convolve(self, x_LC: Tensor) -> Tensor:
        """Two convolutions with kernel 3, the second with stride 2, zeros beyond the ends."""
        x_CL = x_LC.t().unsqueeze(0)
        for layer, stride in ((self.front_end.conv1, 1), (self.front_end.conv2, 2)):
            kernel = layer.weight.view(layer.weight.shape[0], -1, 3)
            x_CL = functional.gelu(functional.conv1d(x_CL, kernel, stride=stride, padding=1))
        return x_CL[0].t()
