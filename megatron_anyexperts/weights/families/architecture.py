"""What a released language model is made of, in one vocabulary for all families, and Megatron's flags for the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_anyexperts.weights.families.rope import Rope


@dataclass(frozen=True)
class Mixture:
    """Mixture layers.

    Attributes:
        experts, topk: experts of a layer, and how many a token gets.
        ffn: inner width of an expert.
        shared_ffn: inner width of all shared experts together; 0 for none.
        dense_layers: layers with a dense FFN instead, counted from 0.
        score: function that makes scores of logits.
        normalised: the gates of a token are divided by their sum.
        scaling: factor on the gates.
        groups, group_topk: groups of experts and how many of them a token reaches; 0 or 1 for no groups.
        expert_bias: a bias that counts for the choice alone.
    """

    experts: int
    topk: int
    ffn: int
    shared_ffn: int = 0
    dense_layers: frozenset[int] = frozenset()
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    scaling: float = 1.0
    groups: int = 0
    group_topk: int = 0
    expert_bias: bool = False

    def flags(self) -> dict[str, Any]:
        """Megatron's flags of the mixture layers."""
        flags: dict[str, Any] = {"num-experts": self.experts, "moe-ffn-hidden-size": self.ffn}
        if self.shared_ffn:
            flags["moe-shared-expert-intermediate-size"] = self.shared_ffn
        flags["moe-router-topk"] = self.topk
        if self.groups > 1:
            flags |= {"moe-router-num-groups": self.groups, "moe-router-group-topk": self.group_topk}
        flags["moe-router-score-function"] = self.score
        if self.score == "softmax" and not self.normalised:
            flags["moe-router-pre-softmax"] = True
        if self.scaling != 1.0:
            flags["moe-router-topk-scaling-factor"] = self.scaling
        flags |= {"moe-router-dtype": "fp32", "moe-token-dispatcher-type": "alltoall"}
        if self.expert_bias:
            flags["moe-router-enable-expert-bias"] = True
        return flags


@dataclass(frozen=True)
class Latent:
    """Multi-latent attention.

    Attributes:
        query_rank, rank: width of the latent of queries, None for none, and of keys and values.
        plain, rotated, value: width of a head's part without and with rotary positions, and of its values.
    """

    query_rank: int | None
    rank: int
    plain: int
    rotated: int
    value: int

    def flags(self) -> dict[str, Any]:
        """Megatron's flags of attention."""
        flags = {"multi-latent-attention": True, "kv-lora-rank": self.rank}
        if self.query_rank is not None:
            flags["q-lora-rank"] = self.query_rank
        return flags | {"qk-head-dim": self.plain, "qk-pos-emb-head-dim": self.rotated, "v-head-dim": self.value}

    def dims(self, heads: int) -> dict[str, int]:
        """Sizes by the letters that tables of tensors use."""
        return {
            "A": self.query_rank or 0,
            "AQ": heads * (self.plain + self.rotated),
            "C": self.rank,
            "CR": self.rank + self.rotated,
            "CK": heads * (self.plain + self.value),
            "O": heads * self.value,
        }


@dataclass(frozen=True)
class Architecture:
    """A decoder-only language model.

    Attributes:
        vocabulary: rows of the embedding.
        hidden, ffn: width of the residual stream, inner width of a dense FFN.
        layers, heads, groups, head: blocks, query heads, key-value heads, width of a head.
        positions: longest sequence.
        eps: added to the mean of squares in norms.
        rope: rotary positions.
        tied: the output layer is the embedding.
        qkv_bias: queries, keys and values have a bias; nothing else ever has.
        qk_norm: norm of queries and keys: none, over each head, or over all heads together.
        mixture: None for a dense model.
        predictions: multi-token-prediction layers.
        latent: multi-latent attention, or None for the usual one.
    """

    vocabulary: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    head: int
    positions: int
    eps: float
    rope: Rope
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"
    mixture: Mixture | None = None
    predictions: int = 0
    latent: Latent | None = None

    @property
    def pattern(self) -> str:
        """Megatron's `--hybrid-layer-pattern`: two letters a layer."""
        attention = "+" if self.latent else "*"
        main = "".join(attention + ("-" if self.dense(layer) else "E") for layer in range(self.layers))
        return main + f"/{attention}E" * self.predictions

    def dense(self, layer: int) -> bool:
        """Whether a layer has a dense FFN; prediction layers are counted behind the others and never have."""
        return self.mixture is None or layer in self.mixture.dense_layers

    @property
    def dims(self) -> dict[str, int]:
        """Sizes by the letters that tables of tensors use."""
        dims = {"V": self.vocabulary, "H": self.hidden, "2H": 2 * self.hidden, "F": self.ffn, "D": self.head}
        dims |= {"Q": self.heads * self.head, "K": self.groups * self.head}
        dims["QKV"] = dims["Q"] + 2 * dims["K"]
        if self.latent:
            dims |= self.latent.dims(self.heads)
        if self.mixture:
            dims |= {"E": self.mixture.experts, "I": self.mixture.ffn, "S": self.mixture.shared_ffn}
        return dims

    def flags(self) -> dict[str, Any]:
        """Megatron's flags that make the same model, without leading dashes; true is a switch."""
        flags: dict[str, Any] = {
            "hybrid-layer-pattern": self.pattern,
            "hidden-size": self.hidden,
            "ffn-hidden-size": self.ffn,
            "num-attention-heads": self.heads,
            "kv-channels": self.head,
        }
        if not self.latent:  # Megatron refuses both together
            flags |= {"group-query-attention": True, "num-query-groups": self.groups}
        if self.qk_norm != "none":
            flags["qk-layernorm"] = True
        if self.qk_norm == "all":
            flags["qk-norm-all-heads"] = True
        if self.latent:
            flags |= self.latent.flags() | self.rope.latent_flags()
        else:
            flags |= self.rope.flags()
        flags |= {
            "max-position-embeddings": self.positions,
            "normalization": "RMSNorm",
            "norm-epsilon": self.eps,
            "swiglu": True,
            "disable-bias-linear": True,
        }
        if self.qkv_bias:
            flags["add-qkv-bias"] = True
        if not self.tied:
            flags["untie-embeddings-and-output-weights"] = True
        if self.mixture:
            flags |= self.mixture.flags()
        if self.predictions:
            flags["mtp-num-layers"] = self.predictions
        return flags

    def problems(self) -> list[str]:
        """Why Megatron would compute something else; empty if it would not."""
        found = self.rope.problems()
        if self.latent and self.rope.kind not in ("default", "yarn"):
            found.append(f"rope_type={self.rope.kind!r} with multi-latent attention (mapped: default, yarn)")
        if self.latent and self.rope.kind == "yarn" and not self.rope.options.get("truncate", True):
            found.append("rope truncate=False with multi-latent attention: Megatron rounds its correction range always")
        mixture = self.mixture
        if mixture and mixture.groups > 1 and mixture.topk != 2 * mixture.group_topk:
            found.append(
                f"num_experts_per_tok={mixture.topk} with topk_group={mixture.group_topk}: there, groups rank "
                "by their two best experts, Megatron by num_experts_per_tok / topk_group, so the first must be twice "
                "the second"
            )
        if self.predictions > 1:
            found.append(f"num_nextn_predict_layers={self.predictions}: at most 1")
        if mixture and mixture.score == "sigmoid" and not mixture.normalised:
            found.append("norm_topk_prob=False with sigmoid scores: Megatron divides them by their sum")
        return found
