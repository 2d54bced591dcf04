"""What the vision and the audio encoder share: a transformer over packed sequences, and position features."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_anyexperts.models.attention_inputs import packed_lengths
from megatron_anyexperts.models.specs import build_encoder_stack, uses_transformer_engine
from megatron_anyexperts.models.to_device import to_device

_FREQUENCIES = 16
POSITION_FEATURES = 2 * _FREQUENCIES
"""Sines and cosines of one coordinate."""
_LONGEST_WAVE = 10_000.0

_INHERITED = {
    *("tensor_model_parallel_size", "params_dtype", "bf16", "fp16", "transformer_impl", "normalization"),
    *("layernorm_epsilon", "init_method_std", "perform_initialization", "use_cpu_initialization"),
    *("gradient_accumulation_fusion", "deterministic_mode", "attention_backend", "bias_dropout_fusion"),
    *("persist_layer_norm", "masked_softmax_fusion", "enable_autocast", "autocast_dtype"),
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "distribute_saved_activations"),
}

_RECOMPUTED = {"core_attn": "core_attn", "mlp": "mlp", "moe": "mlp", "moe_act": "mlp"}
"""What an encoder recomputes for what the decoder does. Megatron cannot recompute the activation of a dense MLP alone,
so the whole MLP stands for it. Norms are fused into the layers behind them; the rest has no counterpart here."""


def encoder_config(
    decoder: TransformerConfig, num_layers: int, hidden_size: int, ffn_hidden_size: int, num_heads: int
) -> TransformerConfig:
    """Configuration of an encoder next to the decoder of the given configuration.

    The encoder is split over the same tensor-parallel ranks, but never over the sequence: images and clips are short,
    and with whole sequences the gradients of norms and embeddings are the same on all those ranks, so nothing has to
    be summed. Precision, FP8 recipe, initialisation and recomputation follow the decoder.

    Raises:
        ValueError: the tensor-parallel size does not divide `num_heads`, or `num_heads` not `hidden_size`.
    """
    tp = decoder.tensor_model_parallel_size
    if num_heads % tp:
        raise ValueError(f"an encoder of {num_heads} heads cannot be split over tensor_model_parallel_size={tp}")
    if hidden_size % num_heads:
        raise ValueError(f"encoder: hidden_size={hidden_size} is not divisible by {num_heads} heads")
    inherited = {
        field.name: getattr(decoder, field.name)
        for field in fields(TransformerConfig)
        if field.name in _INHERITED or field.name.startswith(("fp8", "tp_only_amax"))
    }
    if decoder.recompute_granularity == "selective":
        modules = sorted({_RECOMPUTED[name] for name in decoder.recompute_modules if name in _RECOMPUTED})
        inherited |= {"recompute_modules": modules} if modules else {"recompute_granularity": None}
    return TransformerConfig(
        **inherited,
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=num_heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        bias_activation_fusion=False,
    )


class PackedTransformer(MegatronModule):
    """Bidirectional transformer over sequences laid end to end; attention stays inside each sequence."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection):
        super().__init__(config)
        self.packed = uses_transformer_engine(config)
        self.stack = build_encoder_stack(config, pg_collection)

    def forward(self, x_PH: Tensor, lengths: Sequence[int]) -> Tensor:
        """Encode `x_PH [P, H]`, the concatenation of sequences of `lengths` (sum P); the result has its shape."""
        return self._packed(x_PH, lengths) if self.packed else self._padded(x_PH, lengths)

    def _packed(self, x_PH: Tensor, lengths: Sequence[int]) -> Tensor:
        """One variable-length row, filled up by a sequence of zeros where FP8 wants a multiple of rows."""
        total = x_PH.size(0)
        rows = get_fp8_align_size(self.config.fp8_recipe) if self.config.fp8 else 1
        if missing := -total % rows:
            lengths = [*lengths, missing]
            x_PH = torch.nn.functional.pad(x_PH, (0, 0, 0, missing))
        borders = packed_lengths(lengths, x_PH.device)
        return self.stack(x_PH.unsqueeze(1), None, packed_seq_params=borders).squeeze(1)[:total]

    def _padded(self, x_PH: Tensor, lengths: Sequence[int]) -> Tensor:
        """Sequences side by side: cheaper than one row with a mask, whose cost grows with the square of P."""
        side = SideBySide.of(lengths, x_PH.device)
        mask = None if min(lengths) == max(lengths) else ~side.real()[:, None, None, :]
        x_NLH = self.stack(side.pad(x_PH).transpose(0, 1).contiguous(), mask).transpose(0, 1)
        return side.unpad(x_NLH)


@dataclass(frozen=True)
class SideBySide:
    """Sequences that follow one another, [P, C], laid side by side, [N, L, C], and back.

    Attributes:
        rows, length: N; L, at least the longest length.
        places_P: int64, where each position goes in N x L; known to the host, so that a GPU is not waited for.
    """

    rows: int
    length: int
    places_P: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, multiple: int = 1) -> "SideBySide":
        """Place sequences of the given lengths; L is the longest rounded up to a multiple of `multiple`."""
        width = -(-max(lengths) // multiple) * multiple
        places = torch.cat([torch.arange(length) + row * width for row, length in enumerate(lengths)])
        return cls(len(lengths), width, to_device(places, device))

    def pad(self, x_PC: Tensor) -> Tensor:
        """[P, C] -> [N, L, C], zeros elsewhere."""
        x_NLC = x_PC.new_zeros(self.rows * self.length, x_PC.size(1)).index_copy(0, self.places_P, x_PC)
        return x_NLC.view(self.rows, self.length, -1)

    def unpad(self, x_NLC: Tensor) -> Tensor:
        """[N, L, C] -> [P, C]."""
        return x_NLC.reshape(self.rows * self.length, -1).index_select(0, self.places_P)

    def real(self) -> Tensor:
        """bool [N, L], false for padding."""
        real = torch.zeros(self.rows * self.length, dtype=torch.bool, device=self.places_P.device)
        return real.index_fill_(0, self.places_P, True).view(self.rows, self.length)


class FourierPositions(torch.nn.Module):
    """Position embedding of integer coordinates: sines and cosines of each axis, then a learned linear map.

    There is no table and so no largest image or longest clip. Axes are embedded apart and added, as NaViT
    (arXiv 2307.06304, section 2.1) does with its factorised embeddings.
    """

    def __init__(self, axes: int, config: TransformerConfig):
        super().__init__()
        self.project = plain_linear(axes * POSITION_FEATURES, config)

    def forward(self, positions_PA: Tensor) -> Tensor:
        """Embed integer positions [P, axes] as [P, hidden_size]."""
        exponents = torch.arange(_FREQUENCIES, device=positions_PA.device) / _FREQUENCIES
        angles = positions_PA.unsqueeze(-1) * _LONGEST_WAVE**-exponents
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
        return self.project(waves.to(self.project.weight.dtype))


def plain_linear(inputs: int, config: TransformerConfig, std: float | None = None) -> torch.nn.Linear:
    """A linear map to `config.hidden_size` without bias, equal on all tensor-parallel ranks, in `params_dtype`.

    Args:
        std: standard deviation of its weights; None: the configuration's initialisation.
    """
    linear = torch.nn.Linear(inputs, config.hidden_size, bias=False, dtype=config.params_dtype)
    if std is None:
        config.init_method(linear.weight)
    else:
        torch.nn.init.normal_(linear.weight, std=std)
    return linear
