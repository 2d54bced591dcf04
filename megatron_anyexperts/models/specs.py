"""Which modules the decoder and the encoders are made of.

Two implementations, chosen by Megatron's `--transformer-impl`:

- `local`: plain torch and Megatron's parallel linear layers; runs anywhere, CPU included.
- `transformer_engine`: fused norms, attention on packed sequences, grouped GEMM for the experts, FP8.

Both name and cut their tensors alike in distributed checkpoints. Transformer Engine also wants the states beside its
weights, which imported and upcycled checkpoints have (`weights/checkpoint_stream.py`) and those of local training lack.
"""

import copy
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_anyexperts.models.attention import SDPACoreAttention
from megatron_anyexperts.models.latent import latent_layer, norm_latents
from megatron_anyexperts.models.norm import AllHeadsRMSNorm, RMSNorm
from megatron_anyexperts.moe.spec import moe_spec


class AnyExpertsStack(HybridStack):
    """Megatron's hybrid layer stack whose final norm comes from the spec, and which recomputes only what it has.

    Megatron-Core 0.19 builds a Transformer Engine norm there whatever the spec says.

    Args:
        norm: builder of the final norm.
        others: see `HybridStack`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        norm: LayerNormBuilder,
        post_layer_norm: bool = True,
        post_process: bool = True,
        **others,
    ):
        super().__init__(config, submodules, post_layer_norm=False, post_process=post_process, **others)
        self.post_layer_norm = post_layer_norm
        if post_process and post_layer_norm:
            self.final_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        for layer in self.layers:
            if isinstance(getattr(layer, "mlp", None), IdentityOp):
                # Attention's missing MLP: Megatron recomputes it too, which fails under FP8, as it holds no FP8 layer.
                layer.recompute_mlp = False


def uses_transformer_engine(config: TransformerConfig) -> bool:
    """Whether the configuration selects Transformer Engine's modules.

    Raises:
        ValueError: `transformer_impl` is neither `local` nor `transformer_engine`, or the latter is not installed.
    """
    if config.transformer_impl == "local":
        return False
    if config.transformer_impl != "transformer_engine":
        raise ValueError(f"transformer_impl={config.transformer_impl}: use local or transformer_engine")
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        raise ValueError(
            "transformer_impl=transformer_engine, but Transformer Engine cannot be imported: "
            "run ./bootstrap.sh dev,fp8 on a machine with the CUDA toolkit, or pass --transformer-impl local"
        )
    return True


def decoder_stack_spec(config: TransformerConfig, qk_norm_all_heads: bool = False) -> ModuleSpec:
    """Spec of the decoder's layer stack, for `HybridModel(hybrid_stack_spec=...)`.

    The pattern letters `*` (attention), `+` (multi-latent attention), `-` (dense MLP) and `E` (mixture of experts) are
    served, and the multi-token-prediction block after `/`; the `transformer_engine` spec serves Megatron's other
    letters as well.

    Args:
        config: of class `AnyExpertsConfig` when the pattern has mixture layers.
        qk_norm_all_heads: norms of queries and keys are over all heads together.

    Raises:
        ValueError: see `uses_transformer_engine`.
    """
    if not uses_transformer_engine(config):
        submodules = _local_submodules(config)
        norm = RMSNorm
    else:
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

        submodules = copy.copy(hybrid_stack_spec.submodules)
        norm = TENorm
    if config.multi_latent_attention and config.qk_layernorm:
        submodules.mla_layer = norm_latents(submodules.mla_layer, norm)
    if config.num_moe_experts:
        mixture = moe_spec(config, uses_transformer_engine(config))
        moe = TransformerLayerSubmodules(pre_mlp_layernorm=norm, mlp=mixture, mlp_bda=get_bias_dropout_add)
        submodules.moe_layer = ModuleSpec(module=MoETransformerLayer, submodules=moe)
    if config.qk_layernorm and qk_norm_all_heads:
        submodules.attention_layer = copy.deepcopy(submodules.attention_layer)
        attention = submodules.attention_layer.submodules.self_attention.submodules
        attention.q_layernorm = partial(AllHeadsRMSNorm, heads=config.num_attention_heads)
        attention.k_layernorm = partial(AllHeadsRMSNorm, heads=config.num_query_groups)
    return ModuleSpec(module=AnyExpertsStack, params={"norm": norm}, submodules=submodules)


def build_encoder_stack(config: TransformerConfig, pg_collection: ProcessGroupCollection) -> AnyExpertsStack:
    """A bidirectional transformer of `config.num_layers` blocks (attention, dense MLP) with a final norm.

    It holds the whole encoder on this pipeline stage; attention is limited to one image or clip by the inputs.
    """
    spec = decoder_stack_spec(config)
    submodules = copy.deepcopy(spec.submodules)
    submodules.attention_layer.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    return AnyExpertsStack(
        config,
        submodules,
        **spec.params,
        layer_type_list=["*", "-"] * config.num_layers,
        pg_collection=pg_collection,
    )


def build_projector(
    config: TransformerConfig, input_size: int, output_size: int, pg_collection: ProcessGroupCollection
) -> MLP:
    """Two-layer MLP from encoder features [.., input_size] to the decoder's width [.., output_size]."""
    if uses_transformer_engine(config):
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        submodules = MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
    else:
        submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    projector_config = copy.copy(config)
    # MLP sizes its second layer by the configuration, whatever it is told of the first.
    projector_config.hidden_size = projector_config.ffn_hidden_size = output_size
    return MLP(
        projector_config, submodules, input_size=input_size, ffn_hidden_size=output_size, tp_group=pg_collection.tp
    )


def _local_submodules(config: TransformerConfig) -> HybridStackSubmodules:
    qk_norm = RMSNorm if config.qk_layernorm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SDPACoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    mlp = partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    return HybridStackSubmodules(
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=RMSNorm,
                self_attention=attention,
                self_attn_bda=get_bias_dropout_add,
                # Transformer Engine fuses a norm into the linear layer behind it and names its weight there.
                sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
            ),
        ),
        mla_layer=latent_layer(),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=RMSNorm,
                mlp=mlp,
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
            ),
        ),
        mtp_block_spec=ModuleSpec(
            module=MultiTokenPredictionBlock,
            submodules=MultiTokenPredictionBlockSubmodules(
                layer_specs=[
                    ModuleSpec(
                        module=MultiTokenPredictionLayer,
                        submodules=MultiTokenPredictionLayerSubmodules(
                            enorm=RMSNorm,
                            hnorm=RMSNorm,
                            eh_proj=ColumnParallelLinear,
                            mtp_model_layer=None,  # built from the pattern and the submodules above
                            layer_norm=RMSNorm,
                        ),
                    )
                ]
            ),
        ),
    )
