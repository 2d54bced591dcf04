"""Multi-latent attention (DeepSeek-V2 and V3) beside dynamic slots: the configuration, and the layer without GPU."""

import copy
from argparse import Namespace
from dataclasses import dataclass

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_anyexperts.models.attention import SDPACoreAttention
from megatron_anyexperts.models.norm import RMSNorm
from megatron_anyexperts.moe.config import AnyExpertsConfig

LETTER = "+"
"""Multi-latent attention in a hybrid layer pattern."""


@dataclass
class LatentConfig(AnyExpertsConfig, MLATransformerConfig):
    """`AnyExpertsConfig` of a decoder with multi-latent attention."""

    def __post_init__(self):
        self.multi_latent_attention = True
        super().__post_init__()


def latent_config(args: Namespace) -> LatentConfig:
    """The configuration from Megatron's arguments, whose own way there replaces the class by one without our options.

    The options of yarn without a flag in Megatron's group of this attention are taken from `--yarn-*`.

    Raises:
        ValueError: another kind of positions, or fused ones without yarn.
    """
    from megatron.training.argument_utils import core_transformer_config_from_args

    if args.position_embedding_type != "rope":
        raise ValueError(
            f"position_embedding_type={args.position_embedding_type} with multi_latent_attention: use rope, and "
            "--rope-type yarn for scaled positions"
        )
    plain = Namespace(**vars(args) | {"multi_latent_attention": False, "rope_type": None})
    config = core_transformer_config_from_args(plain, config_class=LatentConfig)
    config.rope_type = args.rope_type or config.rope_type
    if config.apply_rope_fusion and config.rope_type != "yarn":
        raise ValueError("multi_latent_attention with rope_type=rope has no fused kernel: pass --no-rope-fusion")
    for own in ("original_max_position_embeddings", "beta_fast", "beta_slow"):
        if (given := getattr(args, f"yarn_{own}")) is not None:
            setattr(config, own, given)
    return config


def refuse_half_latent(pattern: str, latent: bool) -> None:
    """Refuse a pattern and a configuration that do not agree on attention.

    Raises:
        ValueError: says what is missing.
    """
    if (LETTER in pattern) != latent or (latent and "*" in pattern):
        raise ValueError(
            f"hybrid_layer_pattern={pattern!r} with multi_latent_attention={latent}: the letter {LETTER} is "
            "multi-latent attention and * is not, and a model has one of them; --multi-latent-attention goes with it"
        )


def latent_layer() -> ModuleSpec:
    """The attention layer in plain torch, without the norms of its latents; see `norm_latents`."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=MLASelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=MLASelfAttentionSubmodules(
                    linear_q_proj=ColumnParallelLinear,
                    linear_q_down_proj=ColumnParallelLinear,
                    linear_q_up_proj=ColumnParallelLinear,
                    linear_kv_down_proj=ColumnParallelLinear,
                    linear_kv_up_proj=ColumnParallelLinear,
                    core_attention=SDPACoreAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=IdentityOp,
                    kv_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
        ),
    )


class NormedLatentAttention(MLASelfAttention):
    """Multi-latent attention with the norms and projections that its spec names.

    Megatron 0.19 fuses norms of latents into projections where Transformer Engine is used, under names that the local
    spec has not, and asks for a norm of queries that come without latent, where DeepSeek-V2-Lite has none.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


def norm_latents(layer: ModuleSpec, norm: LayerNormBuilder) -> ModuleSpec:
    """The layer with norms of its own over the latents."""
    layer = copy.deepcopy(layer)
    attention = layer.submodules.self_attention
    attention.module = NormedLatentAttention
    attention.submodules.q_layernorm = attention.submodules.kv_layernorm = norm
    return layer
