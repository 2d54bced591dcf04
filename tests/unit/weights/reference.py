"""BailingMoeV2 in plain torch, written from its description alone: what converted weights are compared with."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

TINY = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    "rope_theta": 600000,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "num_experts": 16,
    "num_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
    "num_nextn_predict_layers": 1,
}


def random_weights(config: dict, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of the architecture, spelled out apart from the converter's own mapping."""
    hidden, head, vocabulary = config["hidden_size"], config["head_dim"], config["vocab_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}

    def matrix(name: str, *shape: int) -> None:
        weights[f"{name}.weight"] = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    def norm(name: str, size: int) -> None:
        weights[f"{name}.weight"] = (1 + 0.2 * torch.randn(size, generator=generator)).to(dtype)

    def feed_forward(name: str, inner: int) -> None:
        matrix(f"{name}.gate_proj", inner, hidden)
        matrix(f"{name}.up_proj", inner, hidden)
        matrix(f"{name}.down_proj", hidden, inner)

    matrix("model.word_embeddings", vocabulary, hidden)
    matrix("lm_head", vocabulary, hidden)
    norm("model.norm", hidden)
    for layer in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        block = f"model.layers.{layer}"
        matrix(f"{block}.attention.query_key_value", (heads + 2 * groups) * head, hidden)
        matrix(f"{block}.attention.dense", hidden, heads * head)
        norm(f"{block}.attention.query_layernorm", head)
        norm(f"{block}.attention.key_layernorm", head)
        norm(f"{block}.input_layernorm", hidden)
        norm(f"{block}.post_attention_layernorm", hidden)
        if layer < config["first_k_dense_replace"]:
            feed_forward(f"{block}.mlp", config["intermediate_size"])
        else:
            matrix(f"{block}.mlp.gate", config["num_experts"], hidden)
            weights[f"{block}.mlp.gate.expert_bias"] = 0.1 * torch.randn(config["num_experts"], generator=generator)
            for expert in range(config["num_experts"]):
                feed_forward(f"{block}.mlp.experts.{expert}", config["moe_intermediate_size"])
            shared = config["moe_intermediate_size"] * config["num_shared_experts"]
            feed_forward(f"{block}.mlp.shared_experts", shared)
        if layer >= config["num_hidden_layers"]:
            matrix(f"{block}.eh_proj", hidden, 2 * hidden)
            for name in ("enorm", "hnorm", "final_layernorm"):
                norm(f"{block}.{name}", hidden)
    return weights


def write(folder: Path, config: dict, weights: dict[str, Tensor]) -> Path:
    """Write a Hugging Face directory with two weight files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: weights[name] for name in part}, folder / f"model-{number:05d}-of-00002.safetensors")
    return folder


class Reference:
    """The forward pass of one row.

    Shapes: S positions, H hidden, N heads, G key-value heads, D head size, E experts, X groups of experts.
    """

    def __init__(self, config: dict, weights: dict[str, Tensor]):
        self.config = config
        self.weights = weights

    def logits(self, tokens_S: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [S, V] of the next token, and of the one after it from the prediction layer."""
        layers = self.config["num_hidden_layers"]
        x_SH = self.weights["model.word_embeddings.weight"][tokens_S]
        for layer in range(layers):
            x_SH = self._block(f"model.layers.{layer}", x_SH, layer < self.config["first_k_dense_replace"])
        x_SH = self._norm("model.norm", x_SH)
        if not self.config["num_nextn_predict_layers"]:
            return self._linear("lm_head", x_SH), None
        name = f"model.layers.{layers}"
        next_S = torch.cat((tokens_S[1:], tokens_S.new_zeros(1)))
        embedded_SH = self._norm(f"{name}.enorm", self.weights["model.word_embeddings.weight"][next_S])
        joined = torch.cat((embedded_SH, self._norm(f"{name}.hnorm", x_SH)), dim=-1)
        deeper_SH = self._block(name, self._linear(f"{name}.eh_proj", joined), dense=False)
        deeper_SH = self._norm(f"{name}.final_layernorm", deeper_SH)
        return self._linear("lm_head", x_SH), self._linear("lm_head", deeper_SH)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.weights[f"{name}.weight"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return x * scale * self.weights[f"{name}.weight"]

    def _block(self, name: str, x_SH: Tensor, dense: bool) -> Tensor:
        x_SH = x_SH + self._attention(f"{name}.attention", self._norm(f"{name}.input_layernorm", x_SH))
        inner_SH = self._norm(f"{name}.post_attention_layernorm", x_SH)
        mlp = self._feed_forward if dense else self._mixture
        return x_SH + mlp(f"{name}.mlp", inner_SH)

    def _attention(self, name: str, x_SH: Tensor) -> Tensor:
        config = self.config
        heads, groups, head = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        qkv = self._linear(f"{name}.query_key_value", x_SH).view(len(x_SH), -1, head)
        query_SND, key_SGD, value_SGD = qkv.split([heads, groups, groups], dim=1)
        query_SND = self._rotate(self._norm(f"{name}.query_layernorm", query_SND))
        key_SGD = self._rotate(self._norm(f"{name}.key_layernorm", key_SGD))
        out_NSD = scaled_dot_product_attention(
            query_SND.transpose(0, 1),
            key_SGD.transpose(0, 1),
            value_SGD.transpose(0, 1),
            is_causal=True,
            enable_gqa=True,
        )
        return self._linear(f"{name}.dense", out_NSD.transpose(0, 1).flatten(1))

    def _rotate(self, x_SND: Tensor) -> Tensor:
        size = int(self.config["head_dim"] * self.config["partial_rotary_factor"])
        frequency = self.config["rope_theta"] ** (-torch.arange(0, size, 2) / size)
        angle_S1D = torch.arange(len(x_SND)).unsqueeze(1).mul(frequency).unsqueeze(1)
        low, high, rest = x_SND.split([size // 2, size // 2, x_SND.shape[-1] - size], dim=-1)
        cos, sin = angle_S1D.cos(), angle_S1D.sin()
        return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)

    def _feed_forward(self, name: str, x: Tensor) -> Tensor:
        return self._linear(
            f"{name}.down_proj", silu(self._linear(f"{name}.gate_proj", x)) * self._linear(f"{name}.up_proj", x)
        )

    def _mixture(self, name: str, x_SH: Tensor) -> Tensor:
        config = self.config
        scores_SE = self._linear(f"{name}.gate", x_SH).sigmoid()
        ranked_SE = scores_SE + self.weights[f"{name}.gate.expert_bias"]
        group_SX = ranked_SE.unflatten(1, (config["n_group"], -1)).topk(2, dim=-1).values.sum(-1)
        best = group_SX.topk(config["topk_group"], dim=1).indices
        open_SX = torch.zeros_like(group_SX, dtype=torch.bool).scatter(1, best, True)
        open_SE = open_SX.repeat_interleave(config["num_experts"] // config["n_group"], dim=1)
        chosen = ranked_SE.masked_fill(~open_SE, float("-inf")).topk(config["num_experts_per_tok"], dim=1).indices
        gates = scores_SE.gather(1, chosen)
        gates = gates / gates.sum(1, keepdim=True) * config["routed_scaling_factor"]
        rows = []
        for token, experts, weights in zip(x_SH, chosen.tolist(), gates, strict=True):
            parts = [self._feed_forward(f"{name}.experts.{expert}", token) for expert in experts]
            rows.append(torch.stack(parts).mul(weights.unsqueeze(1)).sum(0))
        return torch.stack(rows) + self._feed_forward(f"{name}.shared_experts", x_SH)
