"""The tensors of the families, by name and shape. Letters of shapes: `Architecture.dims`.

Sources of the names: the model code of transformers (`models/*/modeling_*.py`) and the published weights; for Ling 2.0
`modeling_bailing_moe_v2.py` of https://github.com/inclusionAI/Ling-V2.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_anyexperts.weights.families.architecture import Architecture
from megatron_anyexperts.weights.families.rows import Row, Table


def _untied(model: Architecture) -> bool:
    return not model.tied


def _biased(model: Architecture) -> bool:
    return model.qkv_bias


def _normed(over: str):
    return lambda model: model.qk_norm == over


def _shares(model: Architecture) -> bool:
    return model.mixture.shared_ffn > 0


def _bias(model: Architecture) -> bool:
    return model.mixture.expert_bias


def _queries(latent: bool):
    return lambda model: (model.latent.query_rank is not None) == latent


def _same(ours: str, theirs: str, letters: str, **others) -> Row:
    return Row(ours, {theirs: letters}, **others)


def _ends(embedding: str) -> tuple[Row, ...]:
    return (
        _same("embedding.word_embeddings.weight", embedding, "V H"),
        _same("decoder.final_norm.weight", "model.norm.weight", "H"),
        _same("output_layer.weight", "lm_head.weight", "V H", when=_untied),
    )


def _feed_forward(here: str, there: str, inner: str, names: tuple[str, str, str], when=lambda model: True):
    """Gate, up and down projection; the first two are one matrix here, gate above up."""
    gate, up, down = (f"{there}{name}.weight" for name in names)
    return (
        Row(f"{here}linear_fc1.weight", {gate: f"{inner} H", up: f"{inner} H"}, when=when),
        _same(f"{here}linear_fc2.weight", down, f"H {inner}", when=when),
    )


_LAYER = "model.layers.{layer}."
_GATED = ("gate_proj", "up_proj", "down_proj")
_HELD = tuple(Row(f"mlp.router.control.{name}", {}, dtype=torch.float32) for name in ("slot_offset", "virtual_bias"))
"""State of our controllers."""

_ATTENTION = (
    _same("self_attention.linear_qkv.layer_norm_weight", f"{_LAYER}input_layernorm.weight", "H"),
    *(
        Row(
            f"self_attention.linear_qkv.{kind}",
            {
                f"{_LAYER}self_attn.{name}_proj.{kind}": f"{letter}{columns}"
                for name, letter in (("q", "Q"), ("k", "K"), ("v", "K"))
            },
            join="groups",
            when=when,
        )
        for kind, columns, when in (("weight", " H", lambda model: True), ("bias", "", _biased))
    ),
    *(
        _same(f"self_attention.{name}_layernorm.weight", f"{_LAYER}self_attn.{name}_norm.weight", letter, when=when)
        for over, letters in (("head", "DD"), ("all", "QK"))
        for name, letter, when in zip("qk", letters, [_normed(over)] * 2, strict=True)
    ),
    _same("self_attention.linear_proj.weight", f"{_LAYER}self_attn.o_proj.weight", "H Q"),
)

LLAMA = Table(
    ends=_ends("model.embed_tokens.weight"),
    attention=_ATTENTION,
    dense=(
        _same("mlp.linear_fc1.layer_norm_weight", f"{_LAYER}post_attention_layernorm.weight", "H"),
        *_feed_forward("mlp.", f"{_LAYER}mlp.", "F", _GATED),
    ),
)
"""Llama and what is built like it: Qwen2 and Qwen3 differ by biases and norms, which the architecture says."""

_MIXTURE = (
    _same("pre_mlp_layernorm.weight", f"{_LAYER}post_attention_layernorm.weight", "H"),
    _same("mlp.router.weight", f"{_LAYER}mlp.gate.weight", "E H"),
    *_HELD,
)

QWEN_MOE = replace(
    LLAMA, mixture=_MIXTURE, expert=_feed_forward("", f"{_LAYER}mlp.experts.{{expert}}.", "I", _GATED)
)
"""Qwen3-MoE and OLMoE."""

MIXTRAL = replace(
    LLAMA,
    mixture=(
        _same("pre_mlp_layernorm.weight", f"{_LAYER}post_attention_layernorm.weight", "H"),
        _same("mlp.router.weight", f"{_LAYER}block_sparse_moe.gate.weight", "E H"),
        *_HELD,
    ),
    expert=_feed_forward("", f"{_LAYER}block_sparse_moe.experts.{{expert}}.", "I", ("w1", "w3", "w2")),
)

_PREDICTION = (
    *(_same(f"{name}.weight", f"{_LAYER}{name}.weight", "H") for name in ("enorm", "hnorm")),
    _same("eh_proj.weight", f"{_LAYER}eh_proj.weight", "H 2H"),
)

LING = Table(
    ends=_ends("model.word_embeddings.weight"),
    attention=(
        _same("self_attention.linear_qkv.layer_norm_weight", f"{_LAYER}input_layernorm.weight", "H"),
        Row(
            "self_attention.linear_qkv.weight", {f"{_LAYER}attention.query_key_value.weight": "QKV H"}, join="groups"
        ),
        _same("self_attention.q_layernorm.weight", f"{_LAYER}attention.query_layernorm.weight", "D"),
        _same("self_attention.k_layernorm.weight", f"{_LAYER}attention.key_layernorm.weight", "D"),
        _same("self_attention.linear_proj.weight", f"{_LAYER}attention.dense.weight", "H Q"),
    ),
    dense=LLAMA.dense,
    mixture=(
        *_MIXTURE,
        _same("mlp.router.expert_bias", f"{_LAYER}mlp.gate.expert_bias", "E", when=_bias, dtype=torch.float32),
        *_feed_forward("mlp.shared_experts.", f"{_LAYER}mlp.shared_experts.", "S", _GATED, when=_shares),
    ),
    expert=QWEN_MOE.expert,
    prediction=(
        *_PREDICTION,
        _same("final_layernorm.weight", f"{_LAYER}final_layernorm.weight", "H"),
    ),
)

_SELF = f"{_LAYER}self_attn."

DEEPSEEK = Table(
    ends=LLAMA.ends,
    attention=(
        _same("input_layernorm.weight", f"{_LAYER}input_layernorm.weight", "H"),
        _same("self_attention.linear_q_proj.weight", f"{_SELF}q_proj.weight", "AQ H", when=_queries(latent=False)),
        _same("self_attention.linear_q_down_proj.weight", f"{_SELF}q_a_proj.weight", "A H", when=_queries(latent=True)),
        _same("self_attention.q_layernorm.weight", f"{_SELF}q_a_layernorm.weight", "A", when=_queries(latent=True)),
        _same("self_attention.linear_q_up_proj.weight", f"{_SELF}q_b_proj.weight", "AQ A", when=_queries(latent=True)),
        _same("self_attention.linear_kv_down_proj.weight", f"{_SELF}kv_a_proj_with_mqa.weight", "CR H"),
        _same("self_attention.kv_layernorm.weight", f"{_SELF}kv_a_layernorm.weight", "C"),
        _same("self_attention.linear_kv_up_proj.weight", f"{_SELF}kv_b_proj.weight", "CK C"),
        _same("self_attention.linear_proj.weight", f"{_SELF}o_proj.weight", "H O"),
    ),
    dense=LLAMA.dense,
    mixture=(
        *_MIXTURE,
        _same(
            "mlp.router.expert_bias",
            f"{_LAYER}mlp.gate.e_score_correction_bias",
            "E",
            when=_bias,
            dtype=torch.float32,
        ),
        *LING.mixture[-2:],
    ),
    expert=QWEN_MOE.expert,
    prediction=(*_PREDICTION, _same("final_layernorm.weight", f"{_LAYER}shared_head.norm.weight", "H")),
    copies={
        f"{_LAYER}embed_tokens.weight": "model.embed_tokens.weight",
        f"{_LAYER}shared_head.head.weight": "lm_head.weight",
    },
)
"""DeepSeek-V2 and V3; the prediction layer stores embedding and output layer once more."""
