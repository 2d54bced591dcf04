"""Tiny random models of transformers' own classes, and ours with the flags that an import writes."""

from pathlib import Path

import torch
import transformers
from megatron.core.models.hybrid.hybrid_layer_allocation import get_hybrid_total_layer_count

from megatron_anyexperts.media import MediaShape
from megatron_anyexperts.models.build import EncoderConfig, LanguageModelConfig, build_model
from megatron_anyexperts.training import identity
from megatron_anyexperts.training.arguments import config_to_argv
from megatron_anyexperts.training.pretrain import transformer_config
from megatron_anyexperts.weights.families.known import read_config

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
LATENT = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    "kv_lora_rank": 16, "q_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
    "num_key_value_heads": 4, "n_shared_experts": 1, "routed_scaling_factor": 1.5, "num_mtp_layers": 0,
}  # fmt: skip
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
    "deepseek v2": ("DeepseekV2", LATENT | {"q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 2}),
    "deepseek v2 yarn": (
        "DeepseekV2",
        LATENT | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 0.707,
                                      "mscale_all_dim": 0.707, "original_max_position_embeddings": 16}},
    ),
    "deepseek v3": ("DeepseekV3", LATENT | {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}),
    "deepseek v3 yarn": (
        "DeepseekV3",
        LATENT | {"n_group": 1, "topk_group": 1, "q_lora_rank": None,
                  "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 16.0,
                                      "original_max_position_embeddings": 16}},
    ),
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


CPU = {
    "transformer-impl": "local",
    "attention-dropout": 0.0,
    "hidden-dropout": 0.0,
    "anyexperts-alpha": 0.0,
} | dict.fromkeys(
    (
        *("no-persist-layer-norm", "no-rope-fusion", "no-masked-softmax-fusion", "no-bias-dropout-fusion"),
        *("no-gradient-accumulation-fusion", "use-cpu-initialization"),
    ),
    True,
)


def ours(config: dict, **changes) -> torch.nn.Module:
    """Our model for a config.json, built from the flags of its architecture as an entry point does, apart from
    `changes` of arguments."""
    architecture, _ = read_config(config)
    parser = identity._parser()
    actions = {option: action for action in parser._actions for option in action.option_strings}
    args = parser.parse_args(config_to_argv(architecture.flags() | CPU, set(), actions))
    # What Megatron's validation and tokenizer fill in.
    args.params_dtype, args.padded_vocab_size = torch.float32, architecture.vocabulary
    args.num_layers = get_hybrid_total_layer_count(architecture.pattern)
    args.moe_router_load_balancing_type = "none"
    for name, value in changes.items():
        setattr(args, name, value)
    parts = (kind.from_args(args) for kind in (LanguageModelConfig, EncoderConfig, MediaShape))
    return build_model(*parts, transformer_config(args)).eval()
