"""Writes a checkpoint as a transformers model with code of its own, for all that the released architectures lack."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_anyexperts.data.tokenizer import SPECIAL_TOKENS
from megatron_anyexperts.data.vocabulary import Vocabulary
from megatron_anyexperts.survival.manifest import tracked_checkpoint
from megatron_anyexperts.training import identity
from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights import hub
from megatron_anyexperts.weights.checkpoint_stream import CheckpointReader
from megatron_anyexperts.weights.conversion import refuse_differences
from megatron_anyexperts.weights.export import refuse_tokenizer, save_groups
from megatron_anyexperts.weights.hub_config import hub_config, processor_config
from megatron_anyexperts.weights.released import copy_tokenizer

CODE = tuple(f"{name}_anyexperts.py" for name in ("configuration", "modeling", "attention", "routing", "encoders"))
_PROCESSOR = "processing_anyexperts.py"
_CLASSES = {
    "AutoConfig": "configuration_anyexperts.AnyExpertsConfig",
    "AutoModelForCausalLM": "modeling_anyexperts.AnyExpertsForCausalLM",
}

_NAMES = (
    (r"^(vision|audio)\.", r"model.\1."),
    (r"\.transformer\.stack\.(final_)?", "."),
    (r"^language_model\.embedding\.word_embeddings\.", "model.embed_tokens."),
    (r"^language_model\.output_layer\.", "lm_head."),
    (r"^language_model\.decoder\.final_norm\.", "model.norm."),
    (r"^language_model\.decoder\.", "model."),
    (r"\.(self_attention\.linear_qkv|mlp\.linear_fc1)\.layer_norm_weight$", ".norm.weight"),
    (r"\.(pre_mlp|input)_layernorm\.", ".norm."),
    (r"\.self_attention\.linear_qkv\.", ".self_attn.qkv_proj."),
    (r"\.self_attention\.linear_proj\.", ".self_attn.o_proj."),
    (r"\.self_attention\.linear_(\w+)_proj\.", r".self_attn.\1_proj."),
    (r"\.self_attention\.(q|k|kv)_layernorm\.", r".self_attn.\1_norm."),
    (r"\.experts\.experts\.linear_fc1\.weight$", ".experts.gate_up_proj"),
    (r"\.experts\.experts\.linear_fc2\.weight$", ".experts.down_proj"),
    (r"^(model\.(?:vision|audio)\..*)\.linear_fc1\.", r"\1.up_proj."),
    (r"\.linear_fc1\.", ".gate_up_proj."),
    (r"\.linear_fc2\.", ".down_proj."),
    (r"\.router\.control\.", ".router."),
)
"""What of a name in our checkpoints is called otherwise there."""
_CONTROLLERS = (".slot_offset", ".virtual_bias")
_UNUSED = re.compile(r"^language_model\.mtp\.")


def export_own(source: Path, tokenizer: Path, target: Path) -> list[Path]:
    """Turn a checkpoint into a folder that transformers loads with `trust_remote_code=True`, whatever it was trained
    with. Memory holds one layer.

    Args:
        source: checkpoint directory, as for `--load`; its newest checkpoint is taken.
        tokenizer: Hugging Face directory of the tokenizer it was trained with.
        target: new directory.

    Returns:
        the weight files.

    Raises:
        UsageError: the checkpoint does not say what model it holds, or it is one that the code cannot compute; the
            tokenizer is another; the target has weights already.
    """
    checkpoint = tracked_checkpoint(source)
    settings = identity.read(checkpoint)
    if settings is None:
        raise UsageError(f"{checkpoint} has no {identity.FILE}, so it does not say what model it holds")
    reader = CheckpointReader(source)
    config = hub_config(settings)
    names = {key: exported_name(key) for key in reader.tensors if not _UNUSED.match(key)}
    shapes = {name: reader.shape(key) for key, name in names.items()}
    expected = _expected(config)
    # Megatron's own router has no controllers; at rest ours change nothing.
    resting = {name for name in expected if settings.get("anyexperts_stock_moe") and name.endswith(_CONTROLLERS)}
    refuse_differences(source, shapes | {name: expected[name] for name in resting}, expected)
    refuse_tokenizer(source, tokenizer, "right one with --tokenizer-model")
    vocabulary = _vocabulary(tokenizer)
    by_layer: dict[str, list[str]] = {}
    for key, name in names.items():
        by_layer.setdefault(".".join(name.split(".")[:3]), []).append(key)
    for kind, encoder in (("image", "vision"), ("video", "vision"), ("audio", "audio")):
        if f"{encoder}_encoder" in config:
            config[f"{kind}_token_id"] = vocabulary.special[SPECIAL_TOKENS[kind]]
    groups = [lambda keys=keys: ((names[key], reader.read(key)) for key in keys) for keys in by_layer.values()]
    if resting:
        groups.append(lambda: ((name, torch.zeros(expected[name])) for name in resting))
    paths, dtype = save_groups(target, groups)
    for name in CODE:
        shutil.copyfile(Path(hub.__file__).parent / name, target / name)
    for name in ("slots.py", "scores.py"):
        shutil.copyfile(hub.DEFINITIONS / name, target / name)
    files = {"config.json": config | _declared(dtype), "generation_config.json": _generation(vocabulary, config)}
    if processor := processor_config(settings):
        shutil.copyfile(Path(hub.__file__).parent / _PROCESSOR, target / _PROCESSOR)
        files["processor_config.json"] = processor | {
            "processor_class": "AnyExpertsProcessor",
            "auto_map": {"AutoProcessor": f"{Path(_PROCESSOR).stem}.AnyExpertsProcessor"},
        }
    for name, values in files.items():
        (target / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(tokenizer, target)
    if left := len(reader.tensors) - len(names):
        print(f"left out, since transformers does not predict several tokens at a time: {left} tensors of mtp")
    return paths


def exported_name(key: str) -> str:
    """Name of a tensor of our checkpoints in the exported model."""
    for pattern, name in _NAMES:
        key = re.sub(pattern, name, key)
    return key


def _declared(dtype: str) -> dict[str, Any]:
    architecture = _CLASSES["AutoModelForCausalLM"].rpartition(".")[2]
    return {"model_type": "anyexperts", "architectures": [architecture], "auto_map": _CLASSES, "dtype": dtype}


def _expected(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that the code asks for, which is built without memory to say so."""
    from megatron_anyexperts.weights.hub.configuration_anyexperts import AnyExpertsConfig
    from megatron_anyexperts.weights.hub.modeling_anyexperts import AnyExpertsForCausalLM

    with torch.device("meta"):
        model = AnyExpertsForCausalLM(AnyExpertsConfig(**config))
    tied = "lm_head.weight" if config["tie_word_embeddings"] else None
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name != tied}


def _vocabulary(folder: Path) -> Vocabulary:
    try:
        return Vocabulary(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"the tokenizer of the model: {error}") from error


def _generation(vocabulary: Vocabulary, config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of generation: what ends an answer, and rows of the embedding that stand for no token."""
    special = {role: vocabulary.special[name] for role, name in SPECIAL_TOKENS.items()}
    unknown = sorted(set(range(config["vocab_size"])) - set(vocabulary.ids()))
    found = {"eos_token_id": [special["turn_end"], special["end_of_text"]], "pad_token_id": special["pad"]}
    return found | ({"suppress_tokens": unknown} if unknown else {})
