"""Tiny models of ours as a run saves them."""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.hybrid.hybrid_layer_allocation import get_hybrid_total_layer_count

from megatron_anyexperts.data.tokenizer import train_tokenizer
from megatron_anyexperts.media import MediaShape
from megatron_anyexperts.models.build import EncoderConfig, LanguageModelConfig, build_model
from megatron_anyexperts.models.multimodal import MultimodalModel
from megatron_anyexperts.survival.manifest import TRACKER, seal
from megatron_anyexperts.training import identity
from megatron_anyexperts.training.arguments import config_to_argv
from megatron_anyexperts.training.pretrain import transformer_config
from tests.unit.weights.released_models import CPU

VOCABULARY = 288
BASE = {
    "hybrid-layer-pattern": "*-*E*E",
    "hidden-size": 32,
    "ffn-hidden-size": 48,
    "num-attention-heads": 4,
    "group-query-attention": True,
    "num-query-groups": 2,
    "kv-channels": 8,
    "seq-length": 64,
    "max-position-embeddings": 64,
    "position-embedding-type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable-bias-linear": True,
    "untie-embeddings-and-output-weights": True,
    "num-experts": 8,
    "moe-ffn-hidden-size": 24,
    "moe-router-topk": 2,
    "moe-token-dispatcher-type": "alltoall",
}


def tokenizer(folder: Path) -> Path:
    """A tokenizer with fewer tokens than the models have rows."""
    train_tokenizer(["a short text, and another text", "texts of words, words of texts"], VOCABULARY - 8, folder)
    return folder


def trained(folder: Path, tokens: Path, flags: dict, dtype: torch.dtype = torch.float32) -> MultimodalModel:
    """Make a model whose every tensor counts, and save it with its settings under `folder`.

    Args:
        tokens: its tokenizer.
        flags: by name, beside `BASE`; None takes one away.
    """
    parser = identity._parser()
    actions = {option: action for action in parser._actions for option in action.option_strings}
    chosen = {name: value for name, value in (BASE | CPU | flags).items() if value is not None}
    args = parser.parse_args(config_to_argv(chosen, set(), actions))
    # What Megatron's validation and tokenizer fill in.
    args.params_dtype, args.padded_vocab_size, args.tokenizer_model = dtype, VOCABULARY, str(tokens)
    args.moe_router_load_balancing_type = "none"
    args.num_layers = get_hybrid_total_layer_count(args.hybrid_layer_pattern)
    args.bf16 = dtype == torch.bfloat16
    config = transformer_config(args)
    torch.manual_seed(3)
    model = build_model(*(kind.from_args(args) for kind in (LanguageModelConfig, EncoderConfig, MediaShape)), config)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("slot_offset", "virtual_bias", "expert_bias")):
                value.add_(torch.randn_like(value) * 0.1)
            elif value.dim() == 1 and value.is_floating_point():
                value.add_(torch.randn_like(value) * 0.2)
            elif value.dim() > 1:
                value.copy_(torch.randn_like(value) / value.shape[-1] ** 0.5)
    target = folder / "iter_0000001"
    target.mkdir(parents=True)
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(target))
    identity.write(target, identity.settings(args, config))
    seal(target)
    (folder / TRACKER).write_text("1")
    return model.eval()
