"""Casts to FP8 with one scale for 128 values of a row, or 128 x 128 of a matrix, as recipe `blockwise` asks for."""

import torch

BLOCK = 128


def cast(x_MK: torch.Tensor, kind: torch.dtype, quantizer, square: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [M, K], and fp32 inverse scales in the layout of Transformer Engine: blocks first, filled up to 4."""
    rows, columns = x_MK.shape
    amax = _blocks(x_MK.abs(), square).clamp_min(quantizer.amax_epsilon)
    scale = torch.where(amax > 0, torch.finfo(kind).max / amax.clamp_min(1e-30), torch.ones_like(amax))
    if quantizer.force_pow_2_scales:
        scale = torch.exp2(scale.log2().floor())
    data = (x_MK * _spread(scale, rows, columns, square)).to(kind).view(torch.uint8)
    inverse = 1 / (scale if square else scale.t())
    return data, torch.nn.functional.pad(inverse, (0, -inverse.size(1) % 4))


def uncast(data_MK: torch.Tensor, kind: torch.dtype, inverse: torch.Tensor, square: bool) -> torch.Tensor:
    """fp32 [M, K], the values that `cast` stored."""
    rows, columns = data_MK.shape
    inverse = inverse[:, : -(-columns // BLOCK)] if square else inverse[:, :rows].t()
    return data_MK.view(kind).float() * _spread(inverse, rows, columns, square)


def _blocks(x_MK: torch.Tensor, square: bool) -> torch.Tensor:
    """Largest value of each block: [M / 128, K / 128] or [M, K / 128], rounded up."""
    high = BLOCK if square else 1
    rows, columns = x_MK.shape
    padded = torch.nn.functional.pad(x_MK, (0, -columns % BLOCK, 0, -rows % high))
    return padded.view(-1, high, padded.size(1) // BLOCK, BLOCK).amax((1, 3))


def _spread(scale: torch.Tensor, rows: int, columns: int, square: bool) -> torch.Tensor:
    wide = scale.repeat_interleave(BLOCK, 1)[:, :columns]
    return wide.repeat_interleave(BLOCK, 0)[:rows] if square else wide
