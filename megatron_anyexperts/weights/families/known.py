"""The families, by the architecture that config.json names, and how each config.json is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.families import tables
from megatron_anyexperts.weights.families.architecture import Architecture, Latent, Mixture
from megatron_anyexperts.weights.families.rope import Rope
from megatron_anyexperts.weights.families.rows import Table

Config = Mapping[str, Any]

_SIZES = {
    "vocabulary": "vocab_size",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "groups": "num_key_value_heads",
    "positions": "max_position_embeddings",
    "eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
"""Field of `Architecture` -> key of config.json, the same in every family."""


_LATENT = {
    "query_rank": "q_lora_rank",
    "rank": "kv_lora_rank",
    "plain": "qk_nope_head_dim",
    "rotated": "qk_rope_head_dim",
    "value": "v_head_dim",
}
"""Field of `Latent` -> key of config.json."""


@dataclass(frozen=True)
class Family:
    """How one architecture is read.

    Attributes:
        architecture: its name in config.json.
        table: its tensors.
        required: values for which the tables are the same function; an absent key has this value as its default there.
        fixed: fields of `Architecture` that every model of the family has.
        mixture: field of `Mixture` -> key of config.json; None for dense models.
        derived: what of the mixture or of the architecture takes more than a key, by field.
        defaults: values of keys that the configuration class of transformers does not fill in.
        optional: fields of `Architecture` that config.json may set, and their keys.
        latent: attention is multi-latent.
    """

    architecture: str
    table: Table
    required: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    mixture: Mapping[str, str] | None = None
    fixed_mixture: Mapping[str, Any] = field(default_factory=dict)
    derived: Mapping[str, Callable[[Config], Any]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    optional: Mapping[str, str] = field(default_factory=dict)
    latent: bool = False

    def read(self, config: Config) -> Architecture:
        """The architecture of a completed config.json; see `read_config`."""
        fields = {name: config.get(key) for name, key in _SIZES.items()}
        fields |= {name: config[key] for name, key in self.optional.items() if config.get(key) is not None}
        fields |= self.fixed
        fields["groups"] = fields["groups"] or fields["heads"]
        if self.latent:
            fields["latent"] = Latent(**{name: config.get(key) for name, key in _LATENT.items()})
            config = {**config, "head_dim": fields["latent"].value}
        fields["head"] = config.get("head_dim") or (fields["hidden"] or 0) // (fields["heads"] or 1)
        fields["rope"] = Rope.read(config["rope_parameters"])
        if self.mixture is not None:
            chosen = {name: config.get(key) for name, key in self.mixture.items()} | self.fixed_mixture
            chosen |= {name: derive(config) for name, derive in self.derived.items()}
            fields["mixture"] = Mixture(**chosen)
        return Architecture(**fields)


def _first_dense(config: Config) -> frozenset[int]:
    return frozenset(range(config["first_k_dense_replace"]))


def _sparse_steps(config: Config) -> frozenset[int]:
    step, dense = config["decoder_sparse_step"], set(config.get("mlp_only_layers") or ())
    return frozenset(
        layer for layer in range(config["num_hidden_layers"]) if layer in dense or (layer + 1) % step or step < 1
    )


def _shared(key: str) -> Callable[[Config], int]:
    """Inner width of the shared experts, of which `key` is the number."""
    return lambda config: config["moe_intermediate_size"] * (config.get(key) or 0)


_GATED = {"hidden_act": "silu"}
_NO_WINDOW = {"use_sliding_window": False}
_QWEN3 = _GATED | _NO_WINDOW | {"attention_bias": False}
# Norms of the latents have a fixed eps of 1e-6 there, whatever rms_norm_eps says.
_DEEPSEEK = _GATED | {"attention_bias": False, "moe_layer_freq": 1, "rms_norm_eps": 1e-6}
_DEEPSEEK_MIXTURE = {
    "experts": "n_routed_experts",
    "topk": "num_experts_per_tok",
    "ffn": "moe_intermediate_size",
    "scaling": "routed_scaling_factor",
}

FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", tables.LLAMA, _GATED | {"attention_bias": False, "mlp_bias": False}),
        Family("Qwen2ForCausalLM", tables.LLAMA, _GATED | _NO_WINDOW, fixed={"qkv_bias": True}),
        Family("Qwen3ForCausalLM", tables.LLAMA, _QWEN3, fixed={"qk_norm": "head"}),
        Family(
            "MixtralForCausalLM",
            tables.MIXTRAL,
            _GATED | {"sliding_window": None},
            mixture={"experts": "num_local_experts", "topk": "num_experts_per_tok", "ffn": "intermediate_size"},
        ),
        Family(
            "Qwen3MoeForCausalLM",
            tables.QWEN_MOE,
            _QWEN3,
            fixed={"qk_norm": "head"},
            mixture={
                "experts": "num_experts",
                "topk": "num_experts_per_tok",
                "ffn": "moe_intermediate_size",
                "normalised": "norm_topk_prob",
            },
            derived={"dense_layers": _sparse_steps},
        ),
        Family(
            "OlmoeForCausalLM",
            tables.QWEN_MOE,
            _GATED | {"attention_bias": False, "clip_qkv": None},
            fixed={"qk_norm": "all"},
            mixture={
                "experts": "num_experts",
                "topk": "num_experts_per_tok",
                "ffn": "intermediate_size",
                "normalised": "norm_topk_prob",
            },
        ),
        Family(
            "DeepseekV2ForCausalLM",
            tables.DEEPSEEK,
            _DEEPSEEK
            | {"mlp_bias": False, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False},
            fixed={"qk_norm": "head"},
            mixture=_DEEPSEEK_MIXTURE,
            fixed_mixture={"normalised": False},
            derived={"dense_layers": _first_dense, "shared_ffn": _shared("n_shared_experts")},
            latent=True,
        ),
        Family(
            "DeepseekV3ForCausalLM",
            tables.DEEPSEEK,
            _DEEPSEEK
            | {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "rope_interleave": True},
            fixed={"qk_norm": "head"},
            mixture=_DEEPSEEK_MIXTURE | {"groups": "n_group", "group_topk": "topk_group"},
            fixed_mixture={"score": "sigmoid", "expert_bias": True},
            derived={"dense_layers": _first_dense, "shared_ffn": _shared("n_shared_experts")},
            optional={"predictions": "num_nextn_predict_layers"},
            latent=True,
        ),
        Family(
            "BailingMoeV2ForCausalLM",
            tables.LING,
            {
                "hidden_act": "silu",
                "use_bias": False,
                "use_qkv_bias": False,
                "use_qk_norm": True,
                "tie_word_embeddings": False,
                "moe_router_enable_expert_bias": True,
                "score_function": "sigmoid",
                "norm_topk_prob": True,
            },
            fixed={"qk_norm": "head"},
            mixture={
                "experts": "num_experts",
                "topk": "num_experts_per_tok",
                "ffn": "moe_intermediate_size",
                "scaling": "routed_scaling_factor",
                "groups": "n_group",
                "group_topk": "topk_group",
            },
            fixed_mixture={"score": "sigmoid", "expert_bias": True},
            derived={"dense_layers": _first_dense, "shared_ffn": _shared("num_shared_experts")},
            defaults={"num_nextn_predict_layers": 0, "tie_word_embeddings": False},
            optional={"predictions": "num_nextn_predict_layers"},
        ),
    )
}


def read_config(config: Config) -> tuple[Architecture, Table]:
    """The architecture that a parsed config.json describes, and the tensors of its family.

    Raises:
        UsageError: another architecture, a missing size, or options for which Megatron would compute something else;
            each is listed.
    """
    names = config.get("architectures") or []
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        raise UsageError(
            f"architectures={names} in config.json is not one that can be converted: {', '.join(FAMILIES)}"
        )
    known = dict(family.defaults) | _completed(config)
    wrong = [
        f"{name}={known[name]!r} (mapped: {value!r})"
        for name, value in family.required.items()
        if known.get(name, value) != value
    ]
    needed = [key for key in {**_SIZES, **(family.mixture or {})}.values() if key != "num_key_value_heads"]
    needed += [key for key in ("first_k_dense_replace", "num_shared_experts") if family.table is tables.LING]
    wrong += [f"{key} is missing" for key in dict.fromkeys(needed) if known.get(key) is None]
    wrong += [] if known["rope_parameters"].get("rope_theta") else ["rope_theta is missing"]
    if not wrong:
        model = family.read(known)
        wrong = model.problems()
    if wrong:
        raise UsageError(
            f"config.json is not a {family.architecture} that can be converted: {'; '.join(wrong)}"
        )
    return model, family.table


def _completed(config: Config) -> dict[str, Any]:
    """config.json with the defaults of its class in transformers, and its rotary settings in one place."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind in CONFIG_MAPPING:
        try:
            read = CONFIG_MAPPING[kind](**config)
            return read.to_dict() | {alias: getattr(read, alias) for alias in read.attribute_map}
        except Exception as error:  # validation of transformers raises many types
            raise UsageError(f"config.json is no {kind} that transformers can read: {error}") from error
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in config:
            rope.setdefault(key, config[key])
    return dict(config) | {"rope_parameters": rope}
