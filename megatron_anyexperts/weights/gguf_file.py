"""A released model in one GGUF file: tensors by the names of transformers, dequantised one at a time, and config.json.

Sources: the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) for names and metadata;
`convert_hf_to_gguf.py` of llama.cpp, which puts the rows of Llama's queries and keys into another order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_anyexperts.training.arguments import UsageError

_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
}
"""general.architecture -> architecture and model_type of config.json."""

_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_IDLE = {"rope.dimension_count", "attention.value_length"}
"""Metadata that must equal the width of a head."""

_ROPE = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.finetuned": None,
}
_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


class GgufFile:
    """Tensors of a GGUF file; one is read at a time, and becomes fp32.

    Args:
        path: the file; a model split over several is refused.

    Attributes:
        names: tensors by the names of transformers; those without one keep the file's.
        config: what config.json would say.

    Raises:
        UsageError: the package `gguf` is missing, the file is damaged, or of an architecture that is not mapped.
    """

    def __init__(self, path: Path):
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise UsageError(f"reading {path.name} needs the package gguf: pip install gguf") from error
        try:
            reader = GGUFReader(path)
        except (ValueError, OSError, IndexError) as error:
            raise UsageError(f"{path} is no GGUF file that can be read: {error}") from error
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        if metadata.get("split.count", 1) > 1:
            raise UsageError(
                f"{path} is one of {metadata['split.count']} files; join them with llama-gguf-split --merge"
            )
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.config = _config(path, metadata, self._tensors)
        self._home: dict[str, tuple[Any, int | None]] = {}
        for name, tensor in self._tensors.items():
            self._home |= _named(name, tensor)
        self.names = set(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        tensor, expert = self._home[name]
        whole = tuple(int(size) for size in reversed(tensor.shape))
        return whole if expert is None else whole[1:]

    def dtype(self, name: str) -> torch.dtype:
        """Type in which `read` gives it."""
        return torch.float32

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        from gguf import dequantize

        tensor, expert = self._home[name]
        data = tensor.data if expert is None else tensor.data[expert]
        values = torch.from_numpy(dequantize(data, tensor.tensor_type).copy()).float().reshape(self.shape(name))
        for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if self.config["model_type"] == "llama" and name.endswith(f".{part}_proj.weight"):
                return values.view(self.config[heads], -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        return values

    def quantised(self) -> dict[str, int]:
        """Number of tensors by the way they are stored."""
        found: dict[str, int] = {}
        for tensor in self._tensors.values():
            found[tensor.tensor_type.name] = found.get(tensor.tensor_type.name, 0) + 1
        return found


def _named(name: str, tensor: Any) -> dict[str, tuple[Any, int | None]]:
    """A tensor by its name over there, or a stack of experts by theirs."""
    match = _NAME.fullmatch(name)
    layer, own, kind = match.groups() if match else (None, None, None)
    if layer is None:
        return {f"{_ENDS[own]}.{kind}" if own in _ENDS else name: (tensor, None)}
    block = f"model.layers.{layer}"
    if own in _EXPERTS:
        experts = range(int(tensor.shape[-1]))
        return {f"{block}.mlp.experts.{expert}.{_EXPERTS[own]}.{kind}": (tensor, expert) for expert in experts}
    return {f"{block}.{_BLOCK[own]}.{kind}" if own in _BLOCK else name: (tensor, None)}


def _config(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    found = metadata.get("general.architecture")
    if found not in _ARCHITECTURES:
        raise UsageError(f"{path}: architecture {found!r} of GGUF is not mapped ({', '.join(_ARCHITECTURES)})")
    architecture, kind = _ARCHITECTURES[found]
    own = {name.removeprefix(f"{found}."): value for name, value in metadata.items() if name.startswith(f"{found}.")}
    config = {key: _exact(own.pop(name)) for name, key in _KEYS.items() if name in own}
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    wrong = [f"{name}={own[name]}, a head is {head} wide" for name in _IDLE & own.keys() if own[name] != head]
    rope = {_ROPE[name]: own[name] for name in _ROPE.keys() & own.keys() if _ROPE[name]}
    if rope.get("rope_type") == "none":
        rope = {}
    wrong += [f"{name}={own[name]!r} is not mapped" for name in sorted(own.keys() - _ROPE.keys() - _IDLE)]
    if kind == "llama" and config.pop("num_experts", 0):
        wrong.append("a mixture under the name of llama (Mixtral): take its safetensors files")
    if wrong:
        raise UsageError(f"{path} cannot be converted: {'; '.join(wrong)}")
    config.setdefault("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())))
    if kind == "qwen3_moe":
        config["norm_topk_prob"] = True  # what llama.cpp computes for it, whatever the file says
    for role in ("bos", "eos"):
        if (token := metadata.get(f"tokenizer.ggml.{role}_token_id")) is not None:
            config[f"{role}_token_id"] = token
    return {"architectures": [architecture], "model_type": kind, **config} | {
        "tie_word_embeddings": "output.weight" not in tensors,
        **({"rope_scaling": rope} if rope else {}),
    }


def _exact(value: Any) -> Any:
    """The shortest decimal that has a value's fp32 bits: files hold 1e-5 as 9.999999747378752e-06."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def tokenizer_of(path: Path) -> Any:
    """The tokenizer of a GGUF file, as transformers has it.

    Raises:
        UsageError: transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # transformers raises many types for many causes
        raise UsageError(f"{path} holds no tokenizer that transformers can read: {error}") from error
