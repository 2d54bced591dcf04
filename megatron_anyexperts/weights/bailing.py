"""How the Hugging Face architecture `BailingMoeV2` (Ling 2.0) maps to Megatron's flags and to our checkpoint keys.

Source of the names: `modeling_bailing_moe_v2.py` of https://github.com/inclusionAI/Ling-V2, the model code of
the published weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_anyexperts.training.arguments import UsageError

_PREFIX = "language_model."
_REQUIRED = {
    "hidden_act": "silu",
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "moe_router_enable_expert_bias": True,
    "score_function": "sigmoid",
    "norm_topk_prob": True,
}
"""Values for which the mapping below is the same function; an absent key has this value as its default there."""


@dataclass(frozen=True)
class Bailing:
    """Sizes of a `BailingMoeV2` model, named as in its config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    n_group: int
    topk_group: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    num_nextn_predict_layers: int
    routed_scaling_factor: float
    rope_theta: float
    partial_rotary_factor: float
    rms_norm_eps: float
    max_position_embeddings: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Bailing:
        """Read a parsed config.json.

        Raises:
            UsageError: it is another architecture, or has an option that is not mapped; each is listed.
        """
        rope = config.get("rope_parameters") or {}  # where transformers 5 keeps the rotary settings
        known = {"head_dim": config.get("hidden_size", 0) // max(config.get("num_attention_heads", 1), 1)}
        known |= {"num_nextn_predict_layers": 0, "partial_rotary_factor": 1.0, **rope} | dict(config)
        wrong = [
            f"{name}={known[name]!r} (mapped: {value!r})"
            for name, value in _REQUIRED.items()
            if known.get(name, value) != value
        ]
        wrong += [f"{name} is missing" for name in cls.__dataclass_fields__ if known.get(name) is None]
        if not wrong:
            sizes = cls(**{name: known[name] for name in cls.__dataclass_fields__})
            wrong = sizes._problems()
        if wrong:
            raise UsageError(f"config.json is not a BailingMoeV2 that can be converted: {'; '.join(wrong)}")
        return sizes

    def _problems(self) -> list[str]:
        problems = []
        if self.num_experts_per_tok != 2 * self.topk_group:
            problems.append(
                f"num_experts_per_tok={self.num_experts_per_tok} with topk_group={self.topk_group}: there, groups rank "
                "by their two best experts, Megatron by num_experts_per_tok / topk_group, so the first must be twice "
                "the second"
            )
        if self.num_nextn_predict_layers > 1:
            problems.append(f"num_nextn_predict_layers={self.num_nextn_predict_layers}: at most 1")
        return problems

    @property
    def pattern(self) -> str:
        """Megatron's `--hybrid-layer-pattern`: two letters a layer."""
        dense = self.first_k_dense_replace
        return "*-" * dense + "*E" * (self.num_hidden_layers - dense) + ("/*E" if self.num_nextn_predict_layers else "")

    def flags(self) -> dict[str, Any]:
        """Megatron's flags that make the same model, without leading dashes; true is a switch."""
        flags = {
            "hybrid-layer-pattern": self.pattern,
            "hidden-size": self.hidden_size,
            "ffn-hidden-size": self.intermediate_size,
            "num-attention-heads": self.num_attention_heads,
            "group-query-attention": True,
            "num-query-groups": self.num_key_value_heads,
            "kv-channels": self.head_dim,
            "qk-layernorm": True,
            "position-embedding-type": "rope",
            "rotary-percent": self.partial_rotary_factor,
            "rotary-base": int(self.rope_theta),
            "max-position-embeddings": self.max_position_embeddings,
            "normalization": "RMSNorm",
            "norm-epsilon": self.rms_norm_eps,
            "swiglu": True,
            "disable-bias-linear": True,
            "untie-embeddings-and-output-weights": True,
            "num-experts": self.num_experts,
            "moe-ffn-hidden-size": self.moe_intermediate_size,
            "moe-shared-expert-intermediate-size": self.moe_intermediate_size * self.num_shared_experts,
            "moe-router-topk": self.num_experts_per_tok,
            "moe-router-num-groups": self.n_group,
            "moe-router-group-topk": self.topk_group,
            "moe-router-score-function": "sigmoid",
            "moe-router-topk-scaling-factor": self.routed_scaling_factor,
            "moe-router-dtype": "fp32",
            "moe-router-enable-expert-bias": True,
        }
        if self.num_nextn_predict_layers:
            flags["mtp-num-layers"] = self.num_nextn_predict_layers
        return flags


@dataclass(frozen=True)
class Mapped:
    """One box of our checkpoint and the Hugging Face tensors with the same numbers.

    Attributes:
        key, whole, offset, shape: as in `checkpoint_stream.Chunk`.
        names: tensors over there, with their shapes; none for state that exists here only and starts at zero.
        join: makes the box from those tensors.
        split: makes those tensors from the box.
        dtype: type here; None for that of the source.
    """

    key: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    names: Mapping[str, tuple[int, ...]]
    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]
    dtype: torch.dtype | None = None


def mapping(sizes: Bailing) -> Iterator[Mapped]:
    """Yield every box of the language model's checkpoint, layer by layer."""
    hidden, vocabulary = sizes.hidden_size, sizes.vocab_size
    yield _same("embedding.word_embeddings.weight", "model.word_embeddings.weight", vocabulary, hidden)
    for layer in range(sizes.num_hidden_layers):
        block = f"decoder.layers.{2 * layer}.", f"decoder.layers.{2 * layer + 1}."
        yield from _block(sizes, *block, f"model.layers.{layer}.", dense=layer < sizes.first_k_dense_replace)
    yield _same("decoder.final_norm.weight", "model.norm.weight", hidden)
    for depth in range(sizes.num_nextn_predict_layers):
        ours, theirs = f"mtp.layers.{depth}.", f"model.layers.{sizes.num_hidden_layers + depth}."
        for name in ("enorm", "hnorm", "final_layernorm"):
            yield _same(f"{ours}{name}.weight", f"{theirs}{name}.weight", hidden)
        yield _same(f"{ours}eh_proj.weight", f"{theirs}eh_proj.weight", hidden, 2 * hidden)
        inner = f"{ours}mtp_model_layer.layers."
        yield from _block(sizes, f"{inner}0.", f"{inner}1.", theirs, dense=False)
    yield _same("output_layer.weight", "lm_head.weight", vocabulary, hidden)


def _block(sizes: Bailing, attention: str, mlp: str, theirs: str, dense: bool) -> Iterator[Mapped]:
    hidden, head = sizes.hidden_size, sizes.head_dim
    query = sizes.num_attention_heads * head
    own, other = f"{attention}self_attention.", f"{theirs}attention."
    yield _same(f"{own}linear_qkv.layer_norm_weight", f"{theirs}input_layernorm.weight", hidden)
    yield _qkv(sizes, f"{own}linear_qkv.weight", f"{other}query_key_value.weight")
    yield _same(f"{own}q_layernorm.weight", f"{other}query_layernorm.weight", head)
    yield _same(f"{own}k_layernorm.weight", f"{other}key_layernorm.weight", head)
    yield _same(f"{own}linear_proj.weight", f"{other}dense.weight", hidden, query)
    norm = "mlp.linear_fc1.layer_norm_weight" if dense else "pre_mlp_layernorm.weight"
    yield _same(f"{mlp}{norm}", f"{theirs}post_attention_layernorm.weight", hidden)
    own, other = f"{mlp}mlp.", f"{theirs}mlp."
    if dense:
        yield from _feed_forward(own, other, hidden, sizes.intermediate_size)
        return
    experts = sizes.num_experts
    yield _same(f"{own}router.weight", f"{other}gate.weight", experts, hidden)
    yield _same(f"{own}router.expert_bias", f"{other}gate.expert_bias", experts, dtype=torch.float32)
    for name in ("slot_offset", "virtual_bias"):
        yield _zero(f"{own}router.control.{name}")
    for expert in range(experts):
        yield from _feed_forward(
            f"{own}experts.experts.",
            f"{other}experts.{expert}.",
            hidden,
            sizes.moe_intermediate_size,
            (expert, experts),
        )
    shared = sizes.moe_intermediate_size * sizes.num_shared_experts
    yield from _feed_forward(f"{own}shared_experts.", f"{other}shared_experts.", hidden, shared)


def _same(key: str, name: str, *shape: int, dtype: torch.dtype | None = None) -> Mapped:
    return Mapped(
        _PREFIX + key,
        shape,
        (0,) * len(shape),
        shape,
        {name: shape},
        lambda tensors: tensors[0],
        lambda box: [box],
        dtype,
    )


def _zero(key: str) -> Mapped:
    return Mapped(_PREFIX + key, (1,), (0,), (1,), {}, lambda tensors: torch.zeros(1), lambda box: [], torch.float32)


def _feed_forward(
    own: str, other: str, hidden: int, inner: int, expert: tuple[int, int] | None = None
) -> Iterator[Mapped]:
    """Gate and up projections are one matrix here; experts of a layer are one tensor with a leading dimension."""
    for key, names, rows, columns in (
        ("linear_fc1", ("gate_proj", "up_proj"), inner, hidden),
        ("linear_fc2", ("down_proj",), hidden, inner),
    ):
        lead = () if expert is None else (1,)
        shape = (*lead, rows * len(names), columns)
        yield Mapped(
            f"{_PREFIX}{own}{key}.weight",
            shape if expert is None else (expert[1], *shape[1:]),
            (0, 0) if expert is None else (expert[0], 0, 0),
            shape,
            {f"{other}{name}.weight": (rows, columns) for name in names},
            lambda tensors, shape=shape: torch.cat(tuple(tensors)).view(shape),
            lambda box, rows=rows, columns=columns: box.reshape(-1, columns).split(rows),
        )


def _qkv(sizes: Bailing, key: str, name: str) -> Mapped:
    """Megatron stores queries, key and value of one group together; there all queries come first."""
    groups, head, hidden = sizes.num_key_value_heads, sizes.head_dim, sizes.hidden_size
    per_group = sizes.num_attention_heads // groups
    rows = (sizes.num_attention_heads + 2 * groups) * head

    def join(tensors: Sequence[Tensor]) -> Tensor:
        parts = tensors[0].split([groups * per_group * head, groups * head, groups * head])
        return torch.cat([part.view(groups, -1, hidden) for part in parts], dim=1).reshape(rows, hidden)

    def split(box: Tensor) -> Sequence[Tensor]:
        parts = box.view(groups, -1, hidden).split([per_group * head, head, head], dim=1)
        return [torch.cat([part.reshape(-1, hidden) for part in parts])]

    shape = (rows, hidden)
    return Mapped(_PREFIX + key, shape, (0, 0), shape, {name: shape}, join, split)
