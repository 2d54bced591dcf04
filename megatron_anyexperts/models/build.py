"""Builds the multimodal model of one pipeline stage, and freezes parts of it."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, fields

from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock

from megatron_anyexperts.media import MediaShape
from megatron_anyexperts.models.audio import AudioEncoder
from megatron_anyexperts.models.encoder import encoder_config
from megatron_anyexperts.models.latent import refuse_half_latent
from megatron_anyexperts.models.multimodal import MultimodalModel
from megatron_anyexperts.models.specs import decoder_stack_spec
from megatron_anyexperts.models.vision import VisionEncoder
from megatron_anyexperts.moe.config import AnyExpertsConfig


@dataclass(frozen=True)
class LanguageModelConfig:
    """What Megatron's language model takes besides its transformer configuration; fields are named like Megatron's."""

    hybrid_layer_pattern: str | None
    padded_vocab_size: int
    max_position_embeddings: int
    untie_embeddings_and_output_weights: bool = True
    position_embedding_type: str = "rope"
    rotary_percent: float = 1.0
    rotary_base: int = 10000
    rotary_seq_len_interpolation_factor: int | None = None
    use_rope_scaling: bool = False
    rope_scaling_factor: float = 8.0
    fp16_lm_cross_entropy: bool = False
    qk_norm_all_heads: bool = False

    @classmethod
    def from_args(cls, args: Namespace) -> "LanguageModelConfig":
        """Read the fields from Megatron's arguments."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


@dataclass
class AttentionConfig:
    """What the attention of some released models has and Megatron has no flag for."""

    qk_norm_all_heads: bool = False
    """With --qk-layernorm: norm queries and keys over all heads together, as OLMoE does, not over each head."""


@dataclass
class EncoderConfig:
    """Encoders in front of the decoder, and which parts of the model are trained."""

    vision_num_layers: int = 0
    """Blocks of the vision encoder (attention and MLP); 0 builds none."""

    vision_hidden_size: int = 1024
    """Width of the vision encoder."""

    vision_ffn_hidden_size: int = 4096
    """Inner width of the vision encoder's MLPs."""

    vision_num_heads: int = 16
    """Attention heads of the vision encoder; divisible by the tensor-parallel size."""

    audio_num_layers: int = 0
    """Blocks of the audio encoder (attention and MLP); 0 builds none."""

    audio_hidden_size: int = 768
    """Width of the audio encoder."""

    audio_ffn_hidden_size: int = 3072
    """Inner width of the audio encoder's MLPs."""

    audio_num_heads: int = 12
    """Attention heads of the audio encoder; divisible by the tensor-parallel size."""

    freeze_vision_encoder: bool = False
    """Do not train the vision encoder (its projector has a flag of its own)."""

    freeze_vision_projector: bool = False
    """Do not train the projector behind the vision encoder."""

    freeze_audio_encoder: bool = False
    """Do not train the audio encoder (its projector has a flag of its own)."""

    freeze_audio_projector: bool = False
    """Do not train the projector behind the audio encoder."""

    freeze_decoder: bool = False
    """Do not train the language model (its importance modules have a flag of their own)."""

    freeze_importance: bool = False
    """Do not train the importance modules that decide how many experts a token gets."""

    @classmethod
    def from_args(cls, args: Namespace) -> "EncoderConfig":
        """Read the fields from Megatron's arguments."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def add_model_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags of attention, the encoders and the media shape; for Megatron's `extra_args_provider`."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    ArgumentGroupFactory(AttentionConfig).build_group(parser, title="attention")
    ArgumentGroupFactory(EncoderConfig).build_group(parser, title="encoders")
    ArgumentGroupFactory(MediaShape).build_group(parser, title="media")
    return parser


def refuse_unsupported(pattern: str | None, config: AnyExpertsConfig) -> None:
    """Refuse what no model can be built from, before anything is built.

    Args:
        pattern: letters of the layers.
        config: of the decoder.

    Raises:
        ValueError: no layer pattern, or a setting that the chosen modules do not support.
    """
    if pattern is None:
        raise ValueError(
            "no --hybrid-layer-pattern given; one letter per layer: * attention, - dense MLP, E mixture of experts, "
            "for example '*-*E*E' for three blocks of which the first is dense"
        )
    refuse_half_latent(pattern, config.multi_latent_attention)
    if config.context_parallel_size > 1:
        _refuse_uncut(pattern, config)
    if (config.mtp_num_layers or 0) > 1 and config.transformer_impl == "local":
        raise ValueError(
            f"mtp_num_layers={config.mtp_num_layers}: without packed sequences only one prediction layer "
            "keeps documents apart; use 1, or --transformer-impl transformer_engine"
        )


def _refuse_uncut(pattern: str, config: AnyExpertsConfig) -> None:
    """Refuse what cannot be split over context-parallel ranks."""
    ways = config.cp_comm_type if isinstance(config.cp_comm_type, list) else [config.cp_comm_type or "p2p"]
    reasons = {
        f"hybrid_layer_pattern={pattern!r}: only the layers *, - and E are cut": bool(set(pattern) - set("*-E|/")),
        "hybrid_context_parallel: it brings a schedule and batches of its own": config.hybrid_context_parallel,
        f"cp_comm_type={config.cp_comm_type}: packed rows go by p2p": set(ways) != {"p2p"},
    }
    if found := [reason for reason, refused in reasons.items() if refused]:
        raise ValueError(f"context_parallel_size={config.context_parallel_size} with {found[0]}; leave one of them out")


def refuse_fp8_rows(seq_length: int, micro_batch_size: int, config: AnyExpertsConfig) -> None:
    """Refuse microbatches whose rows FP8 multiplication cannot take.

    Raises:
        ValueError: names the sizes.
    """
    rows = get_fp8_align_size(config.fp8_recipe) if config.fp8 else 1
    if seq_length * micro_batch_size % rows:
        raise ValueError(
            f"seq_length={seq_length} times micro_batch_size={micro_batch_size} is not a multiple of {rows}, the rows "
            f"that FP8 multiplication with fp8_recipe={config.fp8_recipe} works on"
        )


def can_fuse_gradient_accumulation() -> bool:
    """Whether apex's kernel is there, without which Megatron 0.19 builds no output layer under
    `gradient_accumulation_fusion`, its default, whatever Transformer Engine brings for the other layers."""
    try:
        import fused_weight_gradient_mlp_cuda  # noqa: F401
    except ImportError:
        return False
    return True


def build_model(
    language: LanguageModelConfig,
    encoders: EncoderConfig,
    shape: MediaShape,
    config: AnyExpertsConfig,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> MultimodalModel:
    """Build the part of the model that lives on one pipeline stage.

    Args:
        language: the language model's vocabulary, positions and layers.
        encoders: sizes of the encoders, and what is frozen.
        shape: media geometry.
        config: the decoder's configuration.
        pre_process: first pipeline stage: embedding and encoders.
        post_process: last pipeline stage: output layer and loss.
        vp_stage: virtual pipeline stage.
        pg_collection: process groups; Megatron's global ones if None.

    Raises:
        ValueError: see `refuse_unsupported`.
    """
    refuse_unsupported(language.hybrid_layer_pattern, config)
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    language_model = HybridModel(
        config=config,
        hybrid_stack_spec=decoder_stack_spec(config, language.qk_norm_all_heads),
        vocab_size=language.padded_vocab_size,
        max_sequence_length=language.max_position_embeddings,
        hybrid_layer_pattern=language.hybrid_layer_pattern,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=language.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not language.untie_embeddings_and_output_weights,
        position_embedding_type=language.position_embedding_type,
        rotary_percent=language.rotary_percent,
        rotary_base=language.rotary_base,
        seq_len_interpolation_factor=language.rotary_seq_len_interpolation_factor,
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    if language.use_rope_scaling:
        language_model.rotary_pos_emb = scaled_rotary(language, config, groups)
    vision, audio = build_encoders(encoders, shape, config, groups) if pre_process else (None, None)
    if language_model.mtp_process:
        number_prediction_layers(language_model.mtp)
    model = MultimodalModel(language_model, vision, audio)
    freeze(model, encoders)
    return model


def scaled_rotary(
    language: LanguageModelConfig, config: AnyExpertsConfig, groups: ProcessGroupCollection
) -> RotaryEmbedding:
    """Rotary positions scaled as in Llama 3, which `HybridModel` 0.19 has no argument for.

    Raises:
        ValueError: the positions are not rotary, or scaled another way already.
    """
    if language.position_embedding_type != "rope" or language.rotary_seq_len_interpolation_factor is not None:
        raise ValueError(
            f"use_rope_scaling with position_embedding_type={language.position_embedding_type} and "
            f"rotary_seq_len_interpolation_factor={language.rotary_seq_len_interpolation_factor}: it scales rope "
            "alone; leave one of them out"
        )
    return RotaryEmbedding(
        kv_channels=config.kv_channels,
        rotary_percent=language.rotary_percent,
        rotary_base=language.rotary_base,
        rope_scaling=True,
        rope_scaling_factor=language.rope_scaling_factor,
        use_cpu_initialization=config.use_cpu_initialization,
        cp_group=groups.cp,
    )


def number_prediction_layers(block: MultiTokenPredictionBlock) -> None:
    """Tell the mixture layers of multi-token prediction what they are, so that their figures are their own.

    Megatron-Core 0.19.2 builds them from a hybrid pattern as if they were the decoder's layers of the same number.
    Their figures get the numbers behind the decoder's, one for each prediction depth.
    """
    for prediction in block.layers:
        for layer in prediction.mtp_model_layer.modules():
            if isinstance(layer, MoELayer):
                layer.is_mtp_layer = layer.router.is_mtp_layer = True
                layer.set_layer_number(prediction.layer_number)


def build_encoders(
    encoders: EncoderConfig, shape: MediaShape, config: AnyExpertsConfig, groups: ProcessGroupCollection
) -> tuple[VisionEncoder | None, AudioEncoder | None]:
    """The encoders with at least one layer; None for the others."""
    built = []
    for name, encoder_class in (("vision", VisionEncoder), ("audio", AudioEncoder)):
        layers, *sizes = (
            getattr(encoders, f"{name}_{field}")
            for field in ("num_layers", "hidden_size", "ffn_hidden_size", "num_heads")
        )
        own = encoder_config(config, layers, *sizes) if layers else None
        built.append(encoder_class(own, config.hidden_size, shape, groups) if own else None)
    return tuple(built)


def freeze(model: MultimodalModel, encoders: EncoderConfig) -> None:
    """Switch off the gradients of the parts that `encoders` names; with the decoder's its routers' controllers rest."""
    for name, parameter in model.named_parameters():
        if getattr(encoders, f"freeze_{part_of(name)}"):
            parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, TopKRouter):  # ours sees it by its weight, Megatron's own does not
            module.frozen_expert_bias = encoders.freeze_decoder


def part_of(name: str) -> str:
    """The part of the model a parameter belongs to, from its name without wrappers such as `module.`.

    Returns:
        `vision_encoder`, `vision_projector`, `audio_encoder`, `audio_projector`, `importance` or `decoder`.
    """
    root, *path = name.split(".")
    if root in ("vision", "audio"):
        return f"{root}_{'projector' if path[0] == 'projector' else 'encoder'}"
    return "importance" if "importance" in path else "decoder"
