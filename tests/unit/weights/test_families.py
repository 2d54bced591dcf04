"""Models of transformers' own classes come in, compute the same here, and go out with the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from safetensors.torch import load_file, save_file

from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.checkpoint_stream import CheckpointReader
from megatron_anyexperts.weights.conversion import import_weights
from megatron_anyexperts.weights.export import export_weights
from megatron_anyexperts.weights.families.known import read_config
from tests.unit.weights.released_models import MODELS, SIZES, ours, released

TOKENS = torch.randint(SIZES["vocab_size"], (1, 40), generator=torch.Generator().manual_seed(1))
FP32 = {"rtol": 1e-4, "atol": 1e-5}


def loaded(folder: Path) -> torch.nn.Module:
    """Our model with the weights of an import."""
    model = ours(json.loads((folder / "hf/config.json").read_text()))
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder / "release"))
    model.load_state_dict(state["model"])
    return model


class Imported:
    """A released model, its import, and our model with it."""

    def __init__(self, name: str, folder: Path):
        self.folder = folder
        self.theirs = released(name, folder / "hf")
        import_weights(folder / "hf", folder / "ours")
        self.config = json.loads((folder / "hf/config.json").read_text())
        self.model = loaded(folder / "ours")

    def tensors(self, folder: str) -> dict[str, torch.Tensor]:
        return {name: value for file in (self.folder / folder).glob("*.safetensors") for name, value in
                load_file(file).items()}  # fmt: skip


@pytest.fixture(scope="module")
def everything(world, tmp_path_factory):
    return {name: Imported(name, tmp_path_factory.mktemp("released")) for name in MODELS}


@pytest.fixture(params=MODELS)
def imported(request, everything):
    return everything[request.param]


@torch.no_grad()
def test_logits_are_those_of_transformers(imported):
    here = imported.model(TOKENS, torch.arange(TOKENS.shape[1])[None])
    torch.testing.assert_close(here, imported.theirs(TOKENS).logits, **FP32)


@torch.no_grad()
def test_greedy_generation_with_a_cache_is_that_of_transformers(imported):
    tokens, count = TOKENS[:, :9], 12
    there = imported.theirs.generate(tokens, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    context, fed = StaticInferenceContext(1, tokens.shape[1] + count), tokens
    with InferenceMode.active():
        for _ in range(count):
            positions = torch.arange(fed.shape[1])[None] + context.sequence_len_offset
            logits = imported.model(fed, positions, inference_context=context, runtime_gather_output=True)
            context.sequence_len_offset += fed.shape[1]
            fed = logits[:, -1:].argmax(-1)
            tokens = torch.cat((tokens, fed), dim=1)
    assert tokens.tolist() == there.tolist()


def test_checkpoint_names_and_shapes_are_those_of_the_model(imported):
    state = imported.model.sharded_state_dict()
    apply_factories(state)
    model = {box.key: tuple(box.global_shape) for box in nested_values(state) if isinstance(box, ShardedTensor)}
    reader = CheckpointReader(imported.folder / "ours")
    assert {key: reader.shape(key) for key in reader.tensors} == model


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.load(sys.argv[1])
logits = [AutoModelForCausalLM.from_pretrained(folder)(tokens).logits.detach() for folder in sys.argv[3:]]
torch.save(logits, sys.argv[2])
"""


def test_export_gives_back_every_bit_and_loads_in_a_transformers_that_knows_nothing_of_ours(everything, tmp_path):
    for model in everything.values():
        export_weights(model.folder / "ours", model.folder / "ours/hf/config.json", model.folder / "back")
        there, back = model.tensors("hf"), model.tensors("back")
        assert back.keys() == there.keys()
        assert all(torch.equal(back[name], there[name]) for name in there)
        settings = [json.loads((model.folder / name / "generation_config.json").read_text()) for name in ("hf", "back")]
        assert settings[0] == settings[1]
    torch.save(TOKENS, tmp_path / "tokens")
    folders = [str(model.folder / "back") for model in everything.values()]
    words = [sys.executable, "-c", LOAD, tmp_path / "tokens", tmp_path / "logits", *folders]
    subprocess.run(words, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"})
    for model, logits in zip(everything.values(), torch.load(tmp_path / "logits"), strict=True):
        with torch.no_grad():
            assert torch.equal(logits, model.theirs(TOKENS).logits)


@pytest.mark.parametrize("name", ["qwen2"])
def test_bf16_keeps_its_bits_and_its_type(name, tmp_path):
    released(name, tmp_path / "hf", torch.bfloat16)
    import_weights(tmp_path / "hf", tmp_path / "ours")
    files = export_weights(tmp_path / "ours", tmp_path / "ours/hf/config.json", tmp_path / "back")
    there = {name: value for file in (tmp_path / "hf").glob("*.safetensors") for name, value in load_file(file).items()}
    back = {name: value for file in files for name, value in load_file(file).items()}
    assert all(back[name].dtype == torch.bfloat16 and torch.equal(back[name], there[name]) for name in there)
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"


def change(folder: Path, **tensors: torch.Tensor) -> None:
    """Put tensors into the first weight file, by names with __ for dots."""
    path = min(folder.glob("*.safetensors"))
    named = {name.replace("__", "."): value for name, value in tensors.items()}
    save_file(load_file(path) | named, path, metadata={"format": "pt"})


def test_a_tied_output_layer_may_be_stored_but_not_differ(tmp_path):
    embedding = released("smollm2", tmp_path / "hf").get_input_embeddings().weight.detach()
    change(tmp_path / "hf", lm_head__weight=embedding.clone())
    import_weights(tmp_path / "hf", tmp_path / "ours")
    change(tmp_path / "hf", lm_head__weight=embedding + 1)
    with pytest.raises(UsageError, match=r"lm_head\.weight must equal model\.embed_tokens\.weight"):
        import_weights(tmp_path / "hf", tmp_path / "other")


def test_computed_frequencies_are_left_out_aloud(tmp_path, capsys):
    released("llama", tmp_path / "hf")
    change(tmp_path / "hf", model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    import_weights(tmp_path / "hf", tmp_path / "ours")
    assert "left out, since they are computed: 1 tensors such as model.layers.0" in capsys.readouterr().out


def test_a_bias_that_the_architecture_has_not_is_refused_by_name(tmp_path):
    released("qwen3", tmp_path / "hf")
    change(tmp_path / "hf", model__layers__1__self_attn__q_proj__bias=torch.ones(64))
    with pytest.raises(UsageError, match=r"unknown: model\.layers\.1\.self_attn\.q_proj\.bias \[64\]"):
        import_weights(tmp_path / "hf", tmp_path / "ours")


def test_an_export_without_tensor_says_which(everything, tmp_path):
    imported = everything["llama"]
    config = imported.config | {"num_hidden_layers": 3}
    config.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"missing: language_model\.decoder\.layers\.4\.self_attention"):
        export_weights(imported.folder / "ours", tmp_path / "config.json", tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("Llama", {"attention_bias": True}, "attention_bias=True"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}, "linear rope factor of 2.5"),
        ("Llama", {"rope_theta": 10000.5}, "rope_theta=10000.5"),
        (
            "Llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 8192}},
            "low_freq_factor=2.0",
        ),
        (
            "Qwen2",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
                              "attention_factor": 1.1}},
            "attention_factor=1.1",
        ),
        ("Qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("Mixtral", {"sliding_window": 32}, "sliding_window=32"),
        ("Olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ("DeepseekV2", {"topk_method": "group_limited_greedy"}, "topk_method='group_limited_greedy'"),
        ("DeepseekV3", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
        ("DeepseekV3", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "'linear' with multi-latent"),
        (
            "DeepseekV3",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
                              "truncate": False}},
            "truncate=False with multi-latent",
        ),
        ("Phi3", {}, "architectures=.*Phi3ForCausalLM.*LlamaForCausalLM"),
    ],
)  # fmt: skip
def test_options_for_which_megatron_would_compute_something_else_are_refused(kind, change, message):
    config = getattr(transformers, f"{kind}Config")(**({} if kind == "Phi3" else SIZES)).to_dict()
    if "rope_theta" in change:
        config["rope_parameters"]["rope_theta"] = change["rope_theta"]
    elif "rope_scaling" in change:
        config["rope_parameters"] |= change["rope_scaling"]
    with pytest.raises(UsageError, match=message):
        read_config(config | {"architectures": [f"{kind}ForCausalLM"]} | change)


def test_a_prediction_layer_shares_embedding_and_output_layer(everything, tmp_path):
    """The layer behind the last one, by the names of DeepSeek-V3's files: transformers leaves it out."""
    model, layer = everything["deepseek v3"], "model.layers.2"
    tensors = {name: value.contiguous() for name, value in model.tensors("hf").items()}
    for name in [name for name in tensors if name.startswith("model.layers.1.")]:
        tensors[name.replace("layers.1", "layers.2", 1)] = torch.randn_like(tensors[name])
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{layer}.{name}.weight"] = torch.randn(32)
    tensors[f"{layer}.eh_proj.weight"] = torch.randn(32, 64)
    tensors[f"{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf/model.safetensors")
    config = model.config | {"num_nextn_predict_layers": 1}
    config.pop("num_mtp_layers", None)
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    import_weights(tmp_path / "hf", tmp_path / "ours")
    assert "/+E" in (tmp_path / "ours/model.yaml").read_text()
    loaded(tmp_path / "ours")
    files = export_weights(tmp_path / "ours", tmp_path / "ours/hf/config.json", tmp_path / "back")
    back = {name: value for file in files for name, value in load_file(file).items()}
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)

    save_file(tensors | {f"{layer}.embed_tokens.weight": torch.zeros(96, 32)}, tmp_path / "hf/model.safetensors")
    with pytest.raises(UsageError, match=r"layers\.2\.embed_tokens\.weight must equal model\.embed_tokens"):
        import_weights(tmp_path / "hf", tmp_path / "again")


def test_a_norm_over_all_heads_refuses_ranks_that_have_some(everything):
    with pytest.raises(ValueError, match="tensor_model_parallel_size=2 with qk_norm_all_heads"):
        ours(everything["olmoe"].config, tensor_model_parallel_size=2)


def test_a_pattern_and_its_attention_must_agree(everything):
    with pytest.raises(ValueError, match=r"'\*-\*-' with multi_latent_attention=True"):
        ours(everything["deepseek v3"].config, hybrid_layer_pattern="*-*-")
    with pytest.raises(ValueError, match="position_embedding_type=yarn with multi_latent_attention"):
        ours(everything["deepseek v3"].config, position_embedding_type="yarn")
