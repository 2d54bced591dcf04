"""Tiny random models of transformers' own classes, and ours with the flags that an import writes."""

from pathlib import Path

import torch
import transformers

from megatron_anyexperts.weights.families.known import read_config
from tests.unit.models.small import small_arguments, small_config, small_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
MODELS = {
    "llama": ("Llama", {"rope_theta": 10000.0}),
    "smollm2": ("Llama", {"rope_theta": 100000.0, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama linear": ("Llama", {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama3": ("Llama", {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3"} | LLAMA3, "head_dim": 16}),
    "qwen2": ("Qwen2", {"rope_theta": 1000000.0, "tie_word_embeddings": True}),
    "qwen2 yarn": (
        "Qwen2",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "qwen3": ("Qwen3", {"rope_theta": 1000000.0, "head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen3 moe": (
        "Qwen3Moe",
        EXPERTS | {"norm_topk_prob": True, "head_dim": 16, "num_hidden_layers": 4}
        | {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
    ),
    "qwen3 moe, gates as they are": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": False}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4}),
    "olmoe grouped": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}),
}
"""Name -> class of transformers, and what its configuration has beside `SIZES`."""


def released(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Make a model, with norms and biases that are not what they start as, and save it in two or more files."""
    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**(SIZES | settings))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.dim() == 1 and "inv_freq" not in key:
                value.add_(torch.randn_like(value) * 0.2)
            elif value.dim() > 1:
                value.copy_(torch.randn_like(value) / value.shape[-1] ** 0.5)
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


# Flags of Megatron whose configuration fields are named otherwise, and those that are no field of it.
FIELDS = {"norm-epsilon": "layernorm_epsilon", "num-experts": "num_moe_experts"}
ARGUMENTS = {
    "hybrid-layer-pattern", "position-embedding-type", "rotary-percent", "rotary-base", "max-position-embeddings",
    "untie-embeddings-and-output-weights", "rotary-seq-len-interpolation-factor", "use-rope-scaling",
    "rope-scaling-factor", "qk-norm-all-heads",
}  # fmt: skip
IMPLIED = {"group-query-attention", "swiglu", "disable-bias-linear"}
YARN = {"rotary-scaling-factor": "yarn_rotary_scaling_factor", "mscale": "yarn_mscale"} | {
    "mscale-all-dim": "yarn_mscale_all_dim"
}


def ours(config: dict, **changes) -> torch.nn.Module:
    """Our model for a config.json, built from the flags of its architecture."""
    architecture, _ = read_config(config)
    flags = architecture.flags()
    arguments = {name.replace("-", "_"): flags[name] for name in flags.keys() & ARGUMENTS}
    arguments = {"untie_embeddings_and_output_weights": False} | arguments
    yarn = {
        YARN.get(name, name.replace("-", "_")): flags[name]
        for name in flags
        if name in YARN or name.startswith("yarn-")
    }
    names = flags.keys() - ARGUMENTS - IMPLIED - YARN.keys() - {name for name in flags if name.startswith("yarn-")}
    fields = {FIELDS.get(name, name.replace("-", "_")): flags[name] for name in names}
    static = {"anyexperts_alpha": 0.0}
    settings = small_config(architecture.pattern, **(fields | static | changes))
    if flags["position-embedding-type"] == "yarn":
        defaults = {"yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.0, "yarn_correction_range_round_to_int": True}
        for name, value in (defaults | yarn).items():
            setattr(settings, name, value)
    none = {"padded_vocab_size": architecture.vocabulary, "vision_num_layers": 0, "audio_num_layers": 0}
    return small_model(settings, small_arguments(**(none | arguments))).eval()
