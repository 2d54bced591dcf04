"""Lets Transformer Engine's Python run on a CPU: torch stands for its C++ operators, through its own hook.

`NVTE_PLUGIN=tests.te.reference` (set in tests/conftest.py where there is no CUDA) makes Transformer Engine import this
module in place of its extension. Its modules, FP8 state and recipes, weight caches, recomputation, padding, fused
gradient accumulation and optimizer then run as they are. Nothing here is fast, and nothing here shows that a kernel of
Transformer Engine is right. What is replaced, and what a test over it therefore does not show:

- `generic_gemm`, `te_general_grouped_gemm`: products in fp32, rounded once. FP8 operands are multiplied as the numbers
  they stand for; sizes that cuBLAS refuses are refused. No split accumulators, no overlapped communication, no GELU.
- `rmsnorm_fwd`, `rmsnorm_bwd`: in fp32.
- `quantize`, `split_quantize`, `bgrad_quantize`, `dequantize`, `create_empty_quantized_tensor`, `fp8_transpose`:
  `tests/te/fp8.py`, with one scale a tensor or 128-blocks (`tests/te/blocks.py`); MXFP8 and NVFP4 are refused.
- `fused_amax_and_scale_update_after_reduction`: as Transformer Engine's unfused form of it computes.
- `fused_multi_row_padding`, `fused_multi_row_unpadding`: copies.
- `multi_tensor_adam`, `multi_tensor_scale`, `multi_tensor_scale_tensor`, `multi_tensor_l2norm`: loops.
- `flash_attention`, `get_attention_backend`: always taken, and always torch's attention, document by document, after
  the checks of dtypes and lengths that the kernels rely on. Which backend a GPU would choose is not shown.
- `fused_rope_forward`, `fused_rope_backward`: in fp32, document by document.
- what Transformer Engine alone, of all callers, sees of the device: CUDA is there, tensors lie on it, its generator is
  the CPU's. The capability is 9.0 for everybody. Streams, graphs and all else that is asynchronous do not exist.

An operator that is not named here fails as it does without a driver.
"""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from tests.te import attention, fp8, optimizers

GPU = SimpleNamespace(major=9, minor=0, name="reference", multi_processor_count=132, total_memory=80 << 30)


def generic_gemm(
    A, transpose_a, B, transpose_b, out, quantizer, out_dtype, bias, _bias_dtype, gelu, _gelu_in, grad, *rest, **overlap
):
    """`out = op(B) @ op(A)` in row-major terms; with `grad`, `bias` asks for the sum of B's rows."""
    *_, accumulate, _split = rest
    if gelu or overlap["comm_overlap"] is not None or overlap["alpha"] != 1.0:
        raise NotImplementedError("the reference knows no GELU, overlapped communication or factors in a product")
    product = _multiply(A, transpose_a, B, transpose_b)
    bias_grad = None
    if bias is not None and grad:
        bias_grad = B.reshape(-1, B.shape[-1]).float().sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias
    if out is not None:
        return _store(product, out, accumulate), bias_grad, None, None
    out = product.to(fp8.torch_dtype(out_dtype) if out_dtype is not None else torch.bfloat16)
    return (fp8.quantize(out, quantizer) if quantizer is not None else out), bias_grad, None, None


def te_general_grouped_gemm(
    A, transpose_a, B, transpose_b, out, _out_dtype, m_splits, bias, _bias_dtype, single_output, *rest
):
    """One product per expert; an expert without rows gets a zero weight gradient, or none on top of what is there."""
    *_, accumulate, _split, _sm_count = rest
    if any(each.numel() for each in bias):
        raise NotImplementedError("the reference knows no bias of grouped products")
    outs = out[0].split(m_splits) if single_output else out
    for a, b, each in zip(A, B, outs, strict=True):
        if each.numel() and fp8.shape(b)[0]:
            _store(_multiply(a, transpose_a, b, transpose_b), each, accumulate)
        elif not accumulate:
            each.zero_()
    return bias


def _multiply(A, transpose_a: bool, B, transpose_b: bool) -> torch.Tensor:
    """fp32 product with the leading sizes of B."""
    if fp8.is_quantized(A) != fp8.is_quantized(B):
        raise TypeError("a product of a quantised and a plain operand")
    a, b = fp8.values(A, rowwise=transpose_a), fp8.values(B, rowwise=not transpose_b)
    if fp8.is_quantized(A) and any(size % 16 for size in (*a.shape, *b.shape)):
        raise ValueError(f"sizes of an FP8 product are not multiples of 16: {tuple(a.shape)}, {tuple(b.shape)}")
    product = (b.t() if transpose_b else b) @ (a.t() if transpose_a else a)
    return product if transpose_b else product.view(*fp8.shape(B)[:-1], -1)


def _store(product: torch.Tensor, out: torch.Tensor, accumulate: bool) -> torch.Tensor:
    product = product.view_as(out)
    return out.add_(product.to(out.dtype)) if accumulate else out.copy_(product)


def rmsnorm_fwd(x, weight, eps, out, quantizer, out_dtype, _sm_margin, zero_centered):
    """Returns the normed rows, None for the mean that LayerNorm has, and fp32 reciprocal deviations by row."""
    rows = x.float()
    rsigma = torch.rsqrt(rows.square().mean(-1) + eps)
    normed = (rows * rsigma[..., None] * (weight.float() + zero_centered)).to(fp8.torch_dtype(out_dtype))
    if quantizer is not None:
        normed = fp8.quantize(normed, quantizer, out)
    elif out is not None:
        normed = out.copy_(normed)
    return normed, None, rsigma


def rmsnorm_bwd(dy, x, rsigma, weight, _sm_margin, zero_centered):
    """Gradients of the input and of the weight."""
    rsigma = rsigma.view(*x.shape[:-1], 1)
    normed, dy = x.float() * rsigma, dy.float().view_as(x)
    scaled = dy * (weight.float() + zero_centered)
    dx = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rsigma
    return dx.to(x.dtype), (dy * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)


def fused_multi_row_padding(rows, out, lengths, padded):
    """Each expert's rows followed by zeros up to its padded length."""
    pieces = zip(rows.split(list(lengths)), out.split(list(padded)), strict=True)
    for piece, place in pieces:
        place[: len(piece)] = piece
        place[len(piece) :] = 0


def fused_multi_row_unpadding(rows, out, padded, lengths):
    """The reverse."""
    for piece, place in zip(rows.split(list(padded)), out.split(list(lengths)), strict=True):
        place.copy_(piece[: len(place)])


OPERATORS = {
    "generic_gemm": generic_gemm,
    "te_general_grouped_gemm": te_general_grouped_gemm,
    "rmsnorm_fwd": rmsnorm_fwd,
    "rmsnorm_bwd": rmsnorm_bwd,
    "fused_multi_row_padding": fused_multi_row_padding,
    "fused_multi_row_unpadding": fused_multi_row_unpadding,
    **attention.OPERATORS,
    **fp8.OPERATORS,
    **optimizers.OPERATORS,
}


def load_plugins() -> None:
    """Called by Transformer Engine, after its extension is loaded and before anything uses it."""
    native = sys.modules["transformer_engine_torch_nv"]
    reference = ModuleType("transformer_engine_torch")
    reference.__dict__.update(vars(native) | OPERATORS)
    sys.modules["transformer_engine_torch"] = reference
    torch.Tensor.is_cuda = property(_seen(lambda tensor: True, torch.Tensor.is_cuda.__get__))
    torch.Tensor.record_stream = lambda tensor, stream: None
    torch.cuda.get_device_capability = lambda _device=None: (GPU.major, GPU.minor)
    torch.cuda.is_available = _seen(lambda: True, torch.cuda.is_available)
    torch.cuda.get_device_properties = _seen(lambda _device=None: GPU, torch.cuda.get_device_properties)
    torch.cuda._lazy_init = _seen(lambda: None, torch.cuda._lazy_init)
    torch.cuda._lazy_call = _seen(lambda call, **_: call(), torch.cuda._lazy_call)
    torch.cuda.default_generators = _Generators()


def _seen(by_transformer_engine: Callable, by_others: Callable) -> Callable:
    """A function that answers Transformer Engine otherwise than the rest of the program."""

    def answer(*args: Any, **options: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return (by_transformer_engine if caller.startswith("transformer_engine.") else by_others)(*args, **options)

    return answer


class _Generators:
    """The generator of every device."""

    def __getitem__(self, _device: Any) -> torch.Generator:
        return torch.default_generator
