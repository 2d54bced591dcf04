"""The settings that a checkpoint was saved with, as the configuration of an exported model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_anyexperts.moe.slots import virtual_cap
from megatron_anyexperts.training import identity
from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.training.flag_classes import Kind
from megatron_anyexperts.weights.families.rope import LLAMA3

SIZES = {
    "vocab_size": "padded_vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "layer_pattern": "hybrid_layer_pattern",
    "num_attention_heads": "num_attention_heads",
    "rms_norm_eps": "layernorm_epsilon",
}
"""Key of the configuration -> flag, for every model."""
MIXTURE = {
    "num_moe_experts": "num_experts",
    **{
        name: name
        for name in (
            *("moe_ffn_hidden_size", "moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax"),
            *("moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk"),
            *("moe_router_enable_expert_bias", "anyexperts_k_min", "anyexperts_k_max", "anyexperts_slot_gradient"),
            *("anyexperts_learn_alpha", "anyexperts_importance_hidden", "anyexperts_rho_max"),
            *("anyexperts_virtual_experts", "anyexperts_virtual_kind"),
        )
    },
}
"""The same for models with mixture layers."""

NEEDED = {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False}
"""Flags that the code of an exported model takes for granted, and their values."""

ENCODERS = {"vision": ("patch_size", "spatial_merge"), "audio": ("n_mels", "audio_stride")}
"""Encoders, and the flags of what each reads."""
ENCODER_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_heads")
LATENT = {"query_rank": "q_lora_rank", "rank": "kv_lora_rank", "plain": "qk_head_dim", "value": "v_head_dim"}

_PICTURES = {"min_patches": "data_image_min_patches", "max_patches": "data_image_max_patches"}
_VIDEOS = {"fps": "data_video_fps", "max_frames": "data_video_max_frames", "max_patches": "data_video_max_patches"}
_SOUNDS = {"max_seconds": "data_audio_max_seconds"}
"""Setting of the processor -> flag."""

_READ = {
    *SIZES.values(),
    *MIXTURE.values(),
    *NEEDED,
    *("anyexperts_alpha", "moe_router_dtype", "moe_shared_expert_intermediate_size", "anyexperts_stock_moe"),
    *("group_query_attention", "num_query_groups", "kv_channels", "add_qkv_bias", "qk_layernorm", "qk_norm_all_heads"),
    *("untie_embeddings_and_output_weights", "max_position_embeddings", "tokenizer_model"),
    *("position_embedding_type", "rotary_base", "rotary_percent", "rotary_seq_len_interpolation_factor"),
    *("use_rope_scaling", "rope_scaling_factor", "rotary_scaling_factor", "mscale", "mscale_all_dim"),
    *("yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow"),
    "yarn_correction_range_round_to_int",
    *("multi_latent_attention", "rope_type", *LATENT.values(), "qk_pos_emb_head_dim"),
    *(f"{kind}_{size}" for kind in ENCODERS for size in ENCODER_SIZES),
    *(name for names in ENCODERS.values() for name in names),
}
_IDLE = {
    # Counted from the pattern, or of attention that the pattern does not have.
    *("num_layers", "encoder_num_layers", "is_hybrid_model", "add_position_embedding", "mtp_num_layers"),
    "moe_layer_freq",
    *("mtp_use_repeated_layer", "mtp_hybrid_override_pattern", "relative_attention_num_buckets"),
    "relative_attention_max_distance",
}
_REFUSED_DIALS = {"apply_query_key_layer_scaling", "moe_expert_capacity_factor"}
"""Of the flags that may change on a trained model, those for which an exported one would compute something else."""


def hub_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of the model of a checkpoint.

    Args:
        settings: from `identity.read`.

    Raises:
        UsageError: the model has what the code of an exported one does not compute; each flag is named.
    """
    if missing := [name for name in (*SIZES.values(), *NEEDED, "rotary_base") if name not in settings]:
        raise UsageError(f"the checkpoint does not say what model it holds: {', '.join(missing)} are missing")
    settings = {name: identity.default(name) for name in _READ} | dict(settings)
    _refuse_others(settings)
    found = {key: settings[name] for key, name in SIZES.items()}
    found["layer_pattern"] = found["layer_pattern"].split("/")[0].replace("|", "")
    heads = settings["num_attention_heads"]
    found |= {
        "num_key_value_heads": settings["num_query_groups"] if settings["group_query_attention"] else heads,
        "head_dim": settings["kv_channels"] or settings["hidden_size"] // heads,
        "qk_norm": ("all" if settings["qk_norm_all_heads"] else "head") if settings["qk_layernorm"] else "none",
        "attention_bias": settings["add_qkv_bias"],
        "tie_word_embeddings": not settings["untie_embeddings_and_output_weights"],
        "max_position_embeddings": settings.get("max_position_embeddings") or settings["seq_length"],
        "rope_parameters": _rope(settings),
    }
    if settings["multi_latent_attention"]:
        found |= _latent(settings)
    for kind, geometry in ENCODERS.items():
        if settings[f"{kind}_num_layers"]:
            sizes = {name: settings[f"{kind}_{name}"] for name in ENCODER_SIZES}
            found[f"{kind}_encoder"] = sizes | {name: settings[name] for name in geometry}
    if "E" in found["layer_pattern"]:
        found |= _mixture(settings)
    return found


def processor_config(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Configuration of the processor of the model of a checkpoint; None for a model that reads text alone."""
    parts = {"pictures": ("vision", _PICTURES), "videos": ("vision", _VIDEOS), "sounds": ("audio", _SOUNDS)}
    found = {}
    for part, (encoder, limits) in parts.items():
        if settings.get(f"{encoder}_num_layers"):
            geometry = {} if part == "videos" else {name: settings[name] for name in ENCODERS[encoder]}
            values = {name: settings.get(flag, identity.default(flag)) for name, flag in limits.items()}
            found[part] = geometry | values
    return found or None


def _mixture(settings: Mapping[str, Any]) -> dict[str, Any]:
    topk = settings["moe_router_topk"]
    if settings["anyexperts_stock_moe"]:
        own = {"anyexperts_alpha": 0.0, "anyexperts_learn_alpha": False, "anyexperts_rho_max": 0.0}
        own |= {"anyexperts_k_min": topk, "anyexperts_k_max": topk, "anyexperts_virtual_experts": 0}
        settings = {**settings, **own}
    found = {key: settings[name] for key, name in MIXTURE.items()}
    found["anyexperts_alpha"] = settings["anyexperts_alpha"]
    found["moe_ffn_hidden_size"] = found["moe_ffn_hidden_size"] or settings["ffn_hidden_size"]
    found["moe_shared_expert_intermediate_size"] = settings["moe_shared_expert_intermediate_size"] or 0
    for key in ("anyexperts_k_min", "anyexperts_k_max"):
        found[key] = topk if found[key] is None else found[key]
    if found["anyexperts_virtual_experts"] is None:
        found["anyexperts_virtual_experts"] = virtual_cap(found["anyexperts_k_max"], found["anyexperts_rho_max"])
    slots = {found["anyexperts_k_min"], found["anyexperts_k_max"]}
    static = slots == {topk} and not found["anyexperts_virtual_experts"]
    found["moe_router_dtype"] = settings["moe_router_dtype"] or (None if static else "fp32")
    fuses = found["anyexperts_alpha"] != 0 or found["anyexperts_learn_alpha"]
    found["anyexperts_importance"] = fuses or len(slots) > 1
    return found


def _latent(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What multi-latent attention has instead; Megatron's has positions and a scale of its own."""
    rotated, factor = settings["qk_pos_emb_head_dim"], settings["rotary_scaling_factor"]
    concentration = 1.0 if factor <= 1 else 0.1 * settings["mscale_all_dim"] * math.log(factor) + 1.0
    latent = {name: settings[flag] for name, flag in LATENT.items()}
    latent["scaling"] = concentration**2 / math.sqrt(latent["plain"] + rotated)
    rope = {"rope_type": "default", "rope_theta": float(settings["rotary_base"])}
    if settings["rope_type"] == "rope":
        rope["partial_rotary_factor"] = settings["rotary_percent"]
    else:
        longest = settings["yarn_original_max_position_embeddings"] or 4096
        own = {"yarn_original_max_position_embeddings": longest, "yarn_correction_range_round_to_int": True}
        rope = _rope({**settings, **own, "position_embedding_type": "yarn"})
    found = {"head_dim": rotated, "num_key_value_heads": settings["num_attention_heads"]}
    return found | {"latent": latent, "rope_parameters": rope}


def _rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = {"rope_type": "default", "rope_theta": float(settings["rotary_base"])}
    found["partial_rotary_factor"] = settings["rotary_percent"]
    if settings["position_embedding_type"] == "yarn":
        found |= {
            "rope_type": "yarn",
            "partial_rotary_factor": 1.0,  # Megatron turns the whole head then
            "factor": settings["rotary_scaling_factor"],
            "original_max_position_embeddings": settings["yarn_original_max_position_embeddings"],
            "beta_fast": settings["yarn_beta_fast"] or 32.0,
            "beta_slow": settings["yarn_beta_slow"] or 1.0,
            "truncate": settings["yarn_correction_range_round_to_int"] is not False,
        }
        if settings["mscale"] and settings["mscale_all_dim"]:
            found |= {"mscale": settings["mscale"], "mscale_all_dim": settings["mscale_all_dim"]}
    elif settings["use_rope_scaling"]:
        found |= {"rope_type": "llama3", "factor": settings["rope_scaling_factor"]} | LLAMA3
    elif settings["rotary_seq_len_interpolation_factor"] is not None:
        found |= {"rope_type": "linear", "factor": float(settings["rotary_seq_len_interpolation_factor"])}
    return found


def _refuse_others(settings: Mapping[str, Any]) -> None:
    """Refuse what is neither read nor without effect, unless it has the value it has when nobody sets it."""
    checked = {
        name
        for name in settings.keys() - _READ - _IDLE
        if identity.classify(name) in (Kind.SHAPES, Kind.MEANING) or name in _REFUSED_DIALS
    }
    wrong = {name: settings[name] for name in checked if settings[name] not in (None, identity.default(name))}
    wrong |= {name: settings[name] for name, value in NEEDED.items() if settings[name] != value}
    letters = set(settings["hybrid_layer_pattern"].split("/")[0]) - set("*+-E|")
    if letters:
        wrong["hybrid_layer_pattern"] = settings["hybrid_layer_pattern"]
    if settings["position_embedding_type"] not in ("rope", "yarn"):
        wrong["position_embedding_type"] = settings["position_embedding_type"]
    if wrong:
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(wrong.items()))
        raise UsageError(f"the code of an exported model does not compute {listed}; nothing was written")
