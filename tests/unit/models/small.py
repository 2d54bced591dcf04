"""Small configurations, and batches made by hand."""

from types import SimpleNamespace

import torch
from megatron.core.models.hybrid.hybrid_layer_allocation import get_hybrid_total_layer_count

from megatron_anyexperts.media import MediaShape
from megatron_anyexperts.models.build import EncoderConfig, LanguageModelConfig, build_model
from megatron_anyexperts.models.multimodal import MultimodalModel
from megatron_anyexperts.moe.config import AnyExpertsConfig

SHAPE = MediaShape(patch_size=2, spatial_merge=2, n_mels=5, audio_stride=4)
HIDDEN = 32
VOCABULARY = 64


STOCK = {"anyexperts_stock_moe": True}
DYNAMIC = {"anyexperts_k_min": 1, "anyexperts_k_max": 3, "anyexperts_rho_max": 0.4, "anyexperts_alpha": 0.2}
"""Routing as in Megatron, and with importance, dynamic slots and virtual experts."""


def small_config(pattern: str = "*-*-", **changes) -> AnyExpertsConfig:
    """Decoder configuration for the given pattern; mixture settings as far as the pattern has mixture layers."""
    settings = {
        "num_layers": get_hybrid_total_layer_count(pattern),
        "hidden_size": HIDDEN,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "transformer_impl": "local",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": True,
        "pipeline_dtype": torch.float32,
    }
    if "E" in pattern:
        settings |= {
            "num_moe_experts": 4,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 16,
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "none",
        }
    return AnyExpertsConfig(**(settings | changes))


def small_arguments(**changes) -> dict:
    """The arguments from which a model is built."""
    return {
        "hybrid_layer_pattern": "*-*-",
        "padded_vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "seq_length": 12,
        "micro_batch_size": 1,
        "fp16_lm_cross_entropy": False,
        "untie_embeddings_and_output_weights": True,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_base": 10000,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "qk_norm_all_heads": False,
        "vision_num_layers": 1,
        "vision_hidden_size": 16,
        "vision_ffn_hidden_size": 40,
        "vision_num_heads": 2,
        "audio_num_layers": 1,
        "audio_hidden_size": 24,
        "audio_ffn_hidden_size": 56,
        "audio_num_heads": 2,
        "freeze_vision_encoder": False,
        "freeze_vision_projector": False,
        "freeze_audio_encoder": False,
        "freeze_audio_projector": False,
        "freeze_decoder": False,
        "freeze_importance": False,
        "patch_size": SHAPE.patch_size,
        "spatial_merge": SHAPE.spatial_merge,
        "n_mels": SHAPE.n_mels,
        "audio_stride": SHAPE.audio_stride,
    } | changes


def small_model(config: AnyExpertsConfig, arguments: dict | None = None, **stage) -> MultimodalModel:
    """The model of `small_arguments`."""
    args = SimpleNamespace(**(small_arguments() if arguments is None else arguments))
    parts = (kind.from_args(args) for kind in (LanguageModelConfig, EncoderConfig, MediaShape))
    return build_model(*parts, config, **stage)


def text_batch(lengths: list[int], padding: int = 0, seed: int = 0) -> dict:
    """One packed row of documents of random tokens, then padding."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths) + padding
    segments = [index for index, length in enumerate(lengths, 1) for _ in range(length)] + [0] * padding
    positions = [position for length in [*lengths, padding] for position in range(length)]
    return {
        "tokens": torch.randint(VOCABULARY, (1, total), generator=generator),
        "labels": torch.randint(VOCABULARY, (1, total), generator=generator),
        "position_ids": torch.tensor([positions]),
        "segment_ids": torch.tensor([segments], dtype=torch.int32),
    }


def media_batch() -> dict:
    """One row: text, an image of 2 tokens, text, a clip of 2 tokens, a video of 2 tokens, text, padding."""
    generator = torch.Generator().manual_seed(3)
    modality = [0, 1, 1, 0, 0, 2, 2, 3, 3, 0, -1, -1]
    batch = text_batch([10], padding=2)
    return batch | {
        "token_modality": torch.tensor([modality], dtype=torch.int8),
        "image_grids": torch.tensor([[1, 2, 4], [2, 2, 2]], dtype=torch.int32),
        "image_patches": torch.randn(16, SHAPE.patch_values, generator=generator),
        "audio_lengths": torch.tensor([7], dtype=torch.int32),
        "audio_features": torch.randn(7, SHAPE.n_mels, generator=generator),
    }
