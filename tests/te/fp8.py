"""Casts to FP8 as Transformer Engine's kernels for Hopper make them: one scale a tensor, or `blocks`."""

import torch

from tests.te import blocks

FORMATS = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}


def torch_dtype(dtype) -> torch.dtype:
    """What Transformer Engine's tag of a data type stands for."""
    from transformer_engine.pytorch.constants import DType, TE_DType_To_Torch

    return dtype if isinstance(dtype, torch.dtype) else TE_DType_To_Torch[DType.cast(dtype)]


def is_quantized(x) -> bool:
    """Whether `x` holds FP8 values."""
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage

    return isinstance(x, QuantizedTensorStorage)


def shape(x) -> torch.Size:
    """Sizes of the values that `x` stands for."""
    return torch.Size(x.size())


def values(x, rowwise: bool) -> torch.Tensor:
    """fp32 [rows, columns] from the copy that a product reads; Hopper reads the transposed one where not `rowwise`.

    Raises:
        ValueError: that copy is not there.
    """
    if not is_quantized(x):
        return x.reshape(-1, x.shape[-1]).float()
    if hasattr(x, "_is_2D_scaled"):
        return _values_of_blocks(x, rowwise)
    data = x._data if rowwise else None if x._transpose_invalid else x._transpose
    if data is None:
        raise ValueError(f"an FP8 product reads {'rows' if rowwise else 'columns'} that were not cast")
    stored = data.view(_format(x._fp8_dtype)).float() * x._scale_inv
    return stored.reshape(-1, stored.shape[-1]) if rowwise else stored.reshape(stored.shape[0], -1).t()


def _values_of_blocks(x, rowwise: bool) -> torch.Tensor:
    data = x._rowwise_data if rowwise else x._columnwise_data
    inverse = x._rowwise_scale_inv if rowwise else x._columnwise_scale_inv
    if data is None:
        raise ValueError(f"an FP8 product reads {'rows' if rowwise else 'columns'} that were not cast")
    flat = data.reshape(-1, data.shape[-1]) if rowwise else data.reshape(data.shape[0], -1)
    stored = blocks.uncast(flat, _format(x._fp8_dtype), inverse, x._is_2D_scaled)
    return stored if rowwise else stored.t()


def _format(dtype) -> torch.dtype:
    from transformer_engine.pytorch.constants import DType

    return FORMATS["E4M3" if DType.cast(dtype) == DType.kFloat8E4M3 else "E5M2"]


def _scale(x: torch.Tensor, quantizer, largest: float) -> torch.Tensor:
    """fp32 []; delayed scaling takes that of earlier steps and notes the largest value for later ones."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    amax = x.abs().max() if x.numel() else x.new_zeros(())
    if isinstance(quantizer, Float8Quantizer):
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax.view_as(quantizer.amax)))
        return quantizer.scale.view(())
    if not isinstance(quantizer, Float8CurrentScalingQuantizer):
        raise NotImplementedError(f"the reference does not know {type(quantizer).__name__}")
    if quantizer.with_amax_reduction:
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    scale = torch.where(amax > 0, largest / amax.clamp_min(max(quantizer.amax_epsilon, 1e-30)), torch.ones_like(amax))
    return torch.exp2(scale.log2().floor()) if quantizer.force_pow_2_scales else scale


def quantize(tensor, quantizer, out=None, noop=None):
    """Cast a tensor, into `out` where given; unchanged where `noop` is set."""
    quantize.calls += 1
    if noop is not None and noop.item():
        return out
    x, kind = tensor.detach().float(), _format(quantizer.dtype)
    if hasattr(quantizer, "block_scaling_dim"):
        return _quantize_blocks(x, kind, quantizer, tensor.dtype, out)
    largest = torch.finfo(kind).max
    scale = _scale(x, quantizer, largest)
    data = (x * scale).clamp(-largest, largest).to(kind).view(torch.uint8)
    inverse = (1 / scale).view(1)
    if out is not None:
        out._scale_inv.copy_(inverse)
        if out._data is not None:
            out._data.copy_(data.view_as(out._data))
        if out._transpose is not None:
            fp8_transpose(data, quantizer.dtype, out._transpose)
            out._transpose_invalid = False
        return out
    transpose = fp8_transpose(data, quantizer.dtype) if quantizer.columnwise_usage else None
    return _wrap(tensor, quantizer, data if quantizer.rowwise_usage else None, transpose, inverse)


quantize.calls = 0


def _quantize_blocks(x, kind, quantizer, dtype, out):
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage

    square, flat = quantizer.block_scaling_dim == 2, x.reshape(-1, x.shape[-1])
    fields = dict.fromkeys(("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv"))
    if quantizer.rowwise_usage:
        data, fields["rowwise_scale_inv"] = blocks.cast(flat, kind, quantizer, square)
        fields["rowwise_data"] = data.view(x.shape)
    if quantizer.columnwise_usage:
        data, fields["columnwise_scale_inv"] = blocks.cast(flat.t().contiguous(), kind, quantizer, square)
        fields["columnwise_data"] = data.view(x.shape[-1], *x.shape[:-1])
    if out is not None:
        for name, value in fields.items():
            if (place := getattr(out, f"_{name}")) is not None:
                place.copy_(value)
        return out
    fields |= {"fp8_dtype": quantizer.dtype, "quantizer": quantizer, "is_2D_scaled": square}
    if quantizer.internal:
        return Float8BlockwiseQTensorStorage(**fields, fake_dtype=dtype)
    return Float8BlockwiseQTensor(**fields, shape=x.shape, dtype=dtype, device=x.device, requires_grad=False)


def _wrap(like, quantizer, data, transpose, inverse):
    """What Transformer Engine calls an FP8 tensor of the values in `data` or `transpose`, uint8."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    fields = {
        "data": data,
        "data_transpose": transpose,
        "fp8_scale_inv": inverse,
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=like.dtype, **fields)
    return Float8Tensor(shape=like.shape, dtype=like.dtype, device=torch.device("cpu"), requires_grad=False, **fields)


def create_empty_quantized_tensor(quantizer, size, dtype, _device, _pin_memory):
    """Memory for the result of a cast or an exchange."""
    data = torch.empty(size, dtype=torch.uint8)
    transpose = fp8_transpose(data, quantizer.dtype) if quantizer.columnwise_usage else None
    like = torch.empty(size, dtype=dtype, device="meta")
    return _wrap(like, quantizer, data if quantizer.rowwise_usage else None, transpose, torch.ones(1))


def fp8_transpose(data, _dtype, out=None):
    """uint8 [..., H] -> [H, ...]."""
    turned = data.movedim(-1, 0)
    return turned.contiguous() if out is None else out.copy_(turned.reshape(out.shape))


def split_quantize(tensor, lengths, quantizers, disable_bulk_allocation=False):
    """Cast the rows of each expert by its own quantiser."""
    return [quantize(rows, each) for rows, each in zip(tensor.split(list(lengths)), quantizers, strict=True)]


def bgrad_quantize(grad, quantizer):
    """Gradient of a bias, and the cast gradient."""
    return grad.reshape(-1, grad.shape[-1]).sum(0), quantize(grad, quantizer)


def dequantize(x, dtype):
    """The values that `x` stands for."""
    return values(x, rowwise=x._data is not None).view(shape(x)).to(torch_dtype(dtype))


def fused_amax_and_scale_update_after_reduction(amax, histories, scales, algorithm, dtype, margin):
    """Delayed scaling: put the reduced largest values into each history, take the new scale from it, turn it by one."""
    largest = torch.finfo(_format(dtype)).max
    for now, history, scale in zip(amax.split([h.shape[1] for h in histories]), histories, scales, strict=True):
        history[0].copy_(now)
        seen = history.max(0).values if algorithm == "max" else history[0].clone()
        history.copy_(history.roll(-1, 0))
        history[0].zero_()
        usable = (seen > 0) & seen.isfinite()
        scale.copy_(torch.where(usable, largest / seen.clamp_min(1e-30) / 2**margin, scale))


OPERATORS = {
    "quantize": quantize,
    "create_empty_quantized_tensor": create_empty_quantized_tensor,
    "fp8_transpose": fp8_transpose,
    "split_quantize": split_quantize,
    "bgrad_quantize": bgrad_quantize,
    "dequantize": dequantize,
    "fused_amax_and_scale_update_after_reduction": fused_amax_and_scale_update_after_reduction,
}
