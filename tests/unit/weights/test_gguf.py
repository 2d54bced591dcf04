"""GGUF files come in as transformers reads them."""

import json
import re

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import load_file
from tokenizers import Tokenizer

from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.conversion import import_weights
from megatron_anyexperts.weights.gguf_file import _BLOCK, _ENDS, _EXPERTS, _KEYS, GgufFile
from tests.unit.weights.released_models import SIZES, released
from tests.unit.weights.test_families import FP32, TOKENS, loaded


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Llama's queries or keys as llama.cpp has them: the two halves of each head take turns."""
    head = weight.shape[0] // heads
    order = [first + half for first in range(head // 2) for half in (0, head // 2)]
    return weight.reshape(heads, head, -1)[:, order].reshape(weight.shape)


def write(folder, name: str, kind: str, quantise: str = "", **metadata) -> dict[str, torch.Tensor]:
    """Write the model of that name as a GGUF file; returns what its tensors are worth, by transformers' names."""
    released(name, folder / "hf")
    config = json.loads((folder / "hf/config.json").read_text()) | {"rope_theta": 10000.0}
    tensors = {key: value for file in (folder / "hf").glob("*.safetensors") for key, value in load_file(file).items()}
    writer = GGUFWriter(folder / "model.gguf", kind)
    for own, key in _KEYS.items():
        if key in config and key not in ("num_experts", "moe_intermediate_size"):
            value = config[key]
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{kind}.{own}", value)
    for own, value in metadata.items():
        writer.add_uint32(f"{kind}.{own}", value)
    text = [chr(ord("!") + number) for number in range(SIZES["vocab_size"] - 3)] + ["ab", "abc", "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(text)
    writer.add_token_types([1] * len(text))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {theirs: own for own, theirs in (_ENDS | _BLOCK).items()}
    stacks: dict[str, list[np.ndarray]] = {}
    for key in sorted(tensors, key=lambda key: [int(word) if word.isdigit() else 0 for word in key.split(".")]):
        data = tensors[key].numpy()
        layer, middle, suffix = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*)\.(weight|bias)", key).groups()
        if match := re.fullmatch(r"mlp\.experts\.\d+\.(\w+)", middle):
            own = next(own for own, theirs in _EXPERTS.items() if theirs == match[1])
            stacks.setdefault(f"blk.{layer}.{own}.weight", []).append(data)
            continue
        for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if kind == "llama" and middle == f"self_attn.{part}_proj":
                data = permuted(data, config[heads])
        own = f"{f'blk.{layer}.' if layer else ''}{names[middle]}.{suffix}"
        if quantise and key.endswith(quantise):
            stored = quants.quantize(data, GGMLQuantizationType.Q8_0)
            writer.add_tensor(own, stored, raw_dtype=GGMLQuantizationType.Q8_0)
            tensors[key] = torch.from_numpy(quants.dequantize(stored, GGMLQuantizationType.Q8_0))
        else:
            writer.add_tensor(own, data)
    for own, parts in stacks.items():
        writer.add_tensor(own, np.stack(parts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize(
    ("name", "kind", "metadata"),
    [
        ("llama", "llama", {"rope.dimension_count": 8}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {}),
        ("qwen3 moe, gates as they are", "qwen3moe", {"expert_count": 8, "expert_feed_forward_length": 24}),
    ],
)
def test_tensors_of_a_file_are_those_of_the_model(tmp_path, name, kind, metadata):
    tensors = write(tmp_path, name, kind, **metadata)
    file = GgufFile(tmp_path / "model.gguf")
    assert file.names == tensors.keys()
    for key, tensor in tensors.items():
        assert file.shape(key) == tensor.shape and torch.equal(file.read(key), tensor), key


def test_an_import_computes_what_the_model_does_and_has_its_tokenizer(tmp_path, one_rank, capsys):
    write(tmp_path, "llama", "llama", **{"rope.dimension_count": 8})
    import_weights(tmp_path / "model.gguf", tmp_path / "ours")
    assert "all tensors are fp32 now; they were 21 F32" in capsys.readouterr().out
    theirs = released("llama", tmp_path / "hf")
    with torch.no_grad():
        here = loaded(tmp_path / "ours")(TOKENS, torch.arange(TOKENS.shape[1])[None])
        torch.testing.assert_close(here, theirs(TOKENS).logits, **FP32)
    assert Tokenizer.from_file(str(tmp_path / "ours/hf/tokenizer.json")).encode("abcd").tokens == ["abc", "d"]


def test_quantised_blocks_become_their_numbers(tmp_path):
    tensors = write(tmp_path, "qwen2", "qwen2", quantise="up_proj.weight")
    file = GgufFile(tmp_path / "model.gguf")
    assert file.quantised() == {"F32": 24, "Q8_0": 2}
    for key, tensor in tensors.items():
        assert torch.equal(file.read(key), tensor), key


@pytest.mark.parametrize(
    ("kind", "metadata", "message"),
    [
        ("gemma3", {}, "architecture 'gemma3' of GGUF is not mapped"),
        ("llama", {"rope.dimension_count": 4}, "rope.dimension_count=4, a head is 8 wide"),
        ("llama", {"expert_count": 8}, r"take its safetensors files"),
        ("llama", {"attention.sliding_window": 8}, "attention.sliding_window=8 is not mapped"),
    ],
)
def test_metadata_that_is_not_mapped_is_refused(tmp_path, kind, metadata, message):
    write(tmp_path, "llama", kind, **metadata)
    with pytest.raises(UsageError, match=message):
        GgufFile(tmp_path / "model.gguf")


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"no model")
    with pytest.raises(UsageError, match="no GGUF file that can be read"):
        import_weights(tmp_path / "model.gguf", tmp_path / "ours")
