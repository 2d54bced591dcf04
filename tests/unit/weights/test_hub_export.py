"""What is trained here goes out as a transformers model that computes the same without this project."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from megatron_anyexperts.commands.convert import main
from megatron_anyexperts.data.tokenizer import train_tokenizer
from megatron_anyexperts.moe.metrics import record_tokens
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training import identity
from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.checkpoint_stream import CheckpointReader
from megatron_anyexperts.weights.hub_config import hub_config
from megatron_anyexperts.weights.hub_export import export_own, exported_name
from tests.unit.weights.trained_models import VOCABULARY, tokenizer, trained

FP32 = {"rtol": 1e-4, "atol": 1e-5}
TOKENS = torch.randint(20, VOCABULARY - 20, (1, 40), generator=torch.Generator().manual_seed(1))
DYNAMIC = {"anyexperts-k-min": 1, "anyexperts-k-max": 4, "anyexperts-alpha": 0.2}
LATENT = {"multi-latent-attention": True, "hybrid-layer-pattern": "+-+E+E", "kv-lora-rank": 16, "qk-head-dim": 12} | {
    **{"qk-pos-emb-head-dim": 8, "v-head-dim": 10, "qk-layernorm": True},
    **{"group-query-attention": None, "num-query-groups": None, "kv-channels": None},
}
MODELS = {
    "static": {},
    "static, fused": {"anyexperts-alpha": 0.3, "moe-router-pre-softmax": True, "add-qkv-bias": True},
    "dynamic, tied": DYNAMIC | {"untie-embeddings-and-output-weights": None, "anyexperts-learn-alpha": True}
    | {"anyexperts-slot-gradient": "none"},
    "identity, sigmoid, shared": DYNAMIC
    | {"anyexperts-rho-max": 0.5, "moe-router-score-function": "sigmoid", "moe-router-enable-expert-bias": True}
    | {"moe-shared-expert-intermediate-size": 16, "qk-layernorm": True, "moe-router-topk-scaling-factor": 2.5},
    "zero, straight through": DYNAMIC
    | {"anyexperts-rho-max": 0.5, "anyexperts-virtual-kind": "zero", "anyexperts-slot-gradient": "straight_through"}
    | {"qk-layernorm": True, "qk-norm-all-heads": True, "rotary-percent": 0.5},
    "constant, pre-softmax": DYNAMIC
    | {"anyexperts-rho-max": 0.5, "anyexperts-virtual-kind": "constant", "moe-router-pre-softmax": True}
    | {"anyexperts-virtual-experts": 3, "rotary-seq-len-interpolation-factor": 4},
    "groups": DYNAMIC
    | {"moe-router-score-function": "sigmoid", "moe-router-enable-expert-bias": True, "moe-router-num-groups": 4}
    | {"moe-router-group-topk": 2, "moe-router-topk": 4, "anyexperts-rho-max": 0.3, "anyexperts-alpha": 0.0}
    | {"use-rope-scaling": True, "seq-length": 16384, "hybrid-layer-pattern": "*EE-*E"},
    "encoders": DYNAMIC
    | {"vision-num-layers": 2, "vision-hidden-size": 16, "vision-ffn-hidden-size": 40, "vision-num-heads": 2}
    | {"vision-patch-size": 2, "audio-num-layers": 1, "audio-hidden-size": 24, "audio-ffn-hidden-size": 56}
    | {"audio-num-heads": 2, "audio-n-mels": 5, "audio-stride": 4, "qk-layernorm": True},
    "latent": DYNAMIC | LATENT | {"rope-type": "rope", "moe-router-score-function": "sqrtsoftplus"},
    "latent queries, yarn": DYNAMIC
    | LATENT
    | {"q-lora-rank": 20, "rope-type": "yarn", "rotary-scaling-factor": 4.0, "mscale": 0.707, "mscale-all-dim": 0.8}
    | {"yarn-original-max-position-embeddings": 16, "yarn-beta-fast": 16.0, "yarn-beta-slow": 1.0},
    "yarn": {"position-embedding-type": "yarn", "rotary-scaling-factor": 4.0, "yarn-beta-fast": 32.0}
    | {"yarn-original-max-position-embeddings": 32, "yarn-beta-slow": 1.0, "qk-layernorm": True},
    "stock": {"anyexperts-stock-moe": True, "group-query-attention": None, "num-query-groups": None},
}  # fmt: skip


class Exported:
    """A model of ours, and what transformers makes of its export."""

    def __init__(self, flags: dict, folder, tokens):
        self.folder, self.flags = folder, flags
        self.ours = trained(folder / "run", tokens, flags)
        export_own(folder / "run", tokens, folder / "out")
        self.theirs = AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=True, dtype="auto")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Where transformers copies the code of the models to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def everything(world, tokens, tmp_path_factory):
    return {name: Exported(flags, tmp_path_factory.mktemp("exported"), tokens) for name, flags in MODELS.items()}


@pytest.fixture(params=MODELS)
def exported(request, everything):
    return everything[request.param]


def ours_greedily(model, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """The tokens and `count` more, among those that the tokenizer has, with cached keys and values."""
    context, fed = StaticInferenceContext(1, tokens.shape[1] + count), tokens
    with torch.no_grad(), InferenceMode.active():
        for _ in range(count):
            positions = torch.arange(fed.shape[1])[None] + context.sequence_len_offset
            logits = model(fed, positions, inference_context=context, runtime_gather_output=True)
            context.sequence_len_offset += fed.shape[1]
            fed = logits[:, -1:, : VOCABULARY - 8].argmax(-1)
            tokens = torch.cat((tokens, fed), dim=1)
    return tokens


@torch.no_grad()
def test_logits_and_slots_are_ours(exported):
    positions = torch.arange(TOKENS.shape[1])[None]
    with record_tokens() as layers:
        here = exported.ours(TOKENS, positions)
    there = exported.theirs(TOKENS)
    torch.testing.assert_close(there.logits, here, **FP32)
    slots = [record.slots_SB.t().long() for records in layers.values() for record in records]
    slots = slots or [torch.full_like(TOKENS, 2)] * 2  # Megatron's own layers record none
    assert torch.equal(there.slots, torch.stack(slots))
    assert ("anyexperts-k-max" in exported.flags) == bool(there.slots.float().std() > 0)


def media() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Two pictures, a video and two clips for the placeholders in a row, and the modality of each token."""
    generator = torch.Generator().manual_seed(4)
    modality = torch.tensor([0] * 4 + [1] * 2 + [0] + [3] * 2 + [0, 0] + [2] * 2 + [0] + [1] * 4 + [0] + [2] + [0] * 20)
    inputs = {
        "image_grids": torch.tensor([[1, 2, 4], [2, 2, 2], [1, 4, 4]]),
        "image_patches": torch.randn(32, 12, generator=generator),
        "audio_lengths": torch.tensor([7, 3]),
        "audio_features": torch.randn(10, 5, generator=generator),
    }
    return inputs, modality[None].to(torch.int8)


@torch.no_grad()
def test_pictures_video_and_sound_are_read_as_ours_are(everything):
    exported = everything["encoders"]
    inputs, modality = media()
    config = exported.theirs.config
    tokens = TOKENS.clone()
    for code, token in ((1, config.image_token_id), (2, config.audio_token_id), (3, config.video_token_id)):
        tokens[modality == code] = token
    here = exported.ours(tokens, torch.arange(40)[None], token_modality=modality, **inputs)
    there = exported.theirs(tokens, **inputs).logits
    torch.testing.assert_close(there, here, **FP32)
    assert (there - exported.theirs(TOKENS).logits).abs().max() > 0.1

    # With a cache the media are read once, and each new token sees them.
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached, again = (exported.theirs.generate(tokens, use_cache=use, **options, **inputs) for use in (True, False))
    assert cached.tolist() == again.tolist()
    with pytest.raises(ValueError, match="vision: the tokens hold 8 placeholders, the encoder has features for 0"):
        exported.theirs(tokens)


@torch.no_grad()
def test_greedy_generation_with_a_cache_is_ours(exported):
    start, count = TOKENS[:, :9], 12
    there = exported.theirs.generate(start, max_new_tokens=count, do_sample=False, eos_token_id=None)
    assert there.tolist() == ours_greedily(exported.ours, start, count).tolist()


@torch.no_grad()
def test_a_batch_padded_on_the_left_generates_what_each_row_does(everything):
    model = everything["identity, sigmoid, shared"].theirs
    rows = [TOKENS[:, :9], TOKENS[:, 9:14]]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    alone = [model.generate(row, **options)[0, row.shape[1] :].tolist() for row in rows]
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    padded = torch.cat((rows[0], torch.nn.functional.pad(rows[1], (4, 0))))
    assert model.generate(padded, attention_mask=mask, **options)[:, 9:].tolist() == alone


@torch.no_grad()
def test_attention_in_plain_operators_computes_the_same(everything):
    exported = everything["dynamic, tied"]
    eager = AutoModelForCausalLM.from_pretrained(
        exported.folder / "out", trust_remote_code=True, attn_implementation="eager"
    )
    torch.testing.assert_close(eager(TOKENS).logits, exported.theirs(TOKENS).logits, **FP32)


def test_saved_again_the_bits_are_those_of_the_checkpoint(exported, tmp_path):
    exported.theirs.save_pretrained(tmp_path / "again")
    there, back = weights(exported.folder / "out"), weights(tmp_path / "again")
    assert back.keys() == there.keys() and all(torch.equal(back[name], there[name]) for name in there)
    reader = CheckpointReader(exported.folder / "run")
    assert {exported_name(key) for key in reader.tensors} <= there.keys()
    assert all(torch.equal(reader.read(key), there[exported_name(key)]) for key in reader.tensors)


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokens, results = torch.load(sys.argv[1]), []
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    text = AutoTokenizer.from_pretrained(folder).decode(tokens[0])
    results.append((model(tokens).logits.detach(), text))
ours = sorted(name for name in sys.modules if name.split(".")[0] in ("megatron", "megatron_anyexperts"))
torch.save((ours, results), sys.argv[2])
"""


def test_a_process_without_this_project_computes_the_same_bits(everything, tokens, tmp_path):
    torch.save(TOKENS, tmp_path / "tokens")
    folders = [str(model.folder / "out") for model in everything.values()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "cache")}
    # -I leaves the working directory and PYTHONPATH out of the path, -S what the environment installed as a link.
    site = f"import sys; sys.path.append({str(Path(torch.__file__).parents[1])!r})"
    words = [sys.executable, "-I", "-S", "-c", site + LOAD, tmp_path / "tokens", tmp_path / "results", *folders]
    subprocess.run(words, check=True, cwd=tmp_path, env=environment)
    imported, results = torch.load(tmp_path / "results")
    assert imported == []
    text = AutoTokenizer.from_pretrained(tokens).decode(TOKENS[0])
    for model, (logits, said) in zip(everything.values(), results, strict=True):
        with torch.no_grad():
            assert torch.equal(logits, model.theirs(TOKENS).logits)
        assert said == text


def test_the_code_imports_torch_transformers_and_its_neighbours_alone(everything):
    folder = everything["encoders"].folder / "out"
    # Pictures come as objects of PIL, and who has none needs none.
    known = {"torch", "transformers", "PIL", *sys.stdlib_module_names}
    code = {path.stem: ast.parse(path.read_text()) for path in folder.glob("*.py")}
    assert len(code) == 8
    for tree in code.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in code
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert {name.split(".")[0] for name in names} <= known


def test_fewer_slots_than_trained_are_a_setting_of_the_export(everything, tokens, tmp_path):
    """What --anyexperts-k-max does here, config.json does there."""
    exported = everything["identity, sigmoid, shared"]
    fewer = AutoModelForCausalLM.from_pretrained(exported.folder / "out", trust_remote_code=True, anyexperts_k_max=2)
    here = trained(tmp_path / "run", tokens, exported.flags | {"anyexperts-k-max": 2, "anyexperts-virtual-experts": 2})
    with torch.no_grad():
        there = fewer(TOKENS)
        torch.testing.assert_close(there.logits, here(TOKENS, torch.arange(TOKENS.shape[1])[None]), **FP32)
    assert there.slots.max() == 2


def test_bf16_keeps_its_bits_and_importance_in_fp32(world, tokens, tmp_path):
    trained(tmp_path / "run", tokens, MODELS["constant, pre-softmax"], torch.bfloat16)
    export_own(tmp_path / "run", tokens, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype="auto")
    held = dict(model.state_dict())
    assert all(torch.equal(held[name], value) for name, value in weights(tmp_path / "out").items())
    kinds = {name.removeprefix("model.layers.3.mlp."): value.dtype for name, value in held.items()}
    assert kinds["importance.down"] == kinds["router.slot_offset"] == torch.float32
    assert kinds["experts.down_proj"] == torch.bfloat16
    assert model(TOKENS).logits.isfinite().all()


@torch.no_grad()
def test_prediction_layers_are_left_out_aloud(world, tokens, tmp_path, capsys):
    flags = {"hybrid-layer-pattern": "*E*E/*E", "mtp-num-layers": 1}
    ours = trained(tmp_path / "run", tokens, flags)
    export_own(tmp_path / "run", tokens, tmp_path / "out")
    held = sum("mtp" in key for key in CheckpointReader(tmp_path / "run").tensors)
    assert f"left out, since transformers does not predict several tokens at a time: {held} tensors" in (
        capsys.readouterr().out
    )
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    here = ours(TOKENS, torch.arange(TOKENS.shape[1])[None])
    torch.testing.assert_close(there(TOKENS).logits, here, **FP32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_interleaved": True}, "rotary_interleaved=True"),
        ({"normalization": "LayerNorm"}, "normalization='LayerNorm'"),
        ({"moe_latent_size": 16}, "moe_latent_size=16"),
        ({"moe_shared_expert_gate": True}, "moe_shared_expert_gate=True"),
        ({"window_size": [128, 0]}, "window_size="),
        ({"hybrid_layer_pattern": "M-"}, "hybrid_layer_pattern='M-'"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type='learned_absolute'"),
        ({"apply_query_key_layer_scaling": True}, "apply_query_key_layer_scaling=True"),
    ],
)
def test_what_the_code_does_not_compute_is_refused_by_name(everything, change, message):
    settings = identity.read(everything["static"].folder / "run/iter_0000001")
    hub_config(settings)
    with pytest.raises(UsageError, match=message):
        hub_config(settings | change)


def test_another_tokenizer_and_a_folder_with_weights_are_refused(everything, tokens, tmp_path):
    exported = everything["static"]
    with pytest.raises(UsageError, match="files already"):
        export_own(exported.folder / "run", tokens, exported.folder / "out")
    train_tokenizer(["quite other words"], VOCABULARY - 8, tmp_path / "other")
    with pytest.raises(UsageError, match="right one with --tokenizer-model"):
        export_own(exported.folder / "run", tmp_path / "other", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_takes_the_runs_tokenizer_and_writes_a_card(everything, tokens, tmp_path, capsys):
    run, by_modality = Run(tmp_path / "run"), {"all": {"slots": 2.25, "real": 1.8}, "text": {"slots": 2.5, "real": 2.0}}
    shutil.copytree(everything["dynamic, tied"].folder / "run", run.checkpoints)
    run.logs.mkdir()
    run.config.write_text(f"# python 3.12\ntokenizer-model: {tokens}\nanyexperts-target-slots: 2.25\n")
    layers = {"layers": {"4": {}, "6": {}}}
    line = {"iteration": 7, "loss": 1.5, "routing": by_modality | layers}
    line["routing"]["text"]["tokens"] = 2468
    run.metrics.write_text(json.dumps(line) + "\n")
    assert main(["export", "--run-dir", str(run.root), "--output", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for said in ("| all | 2.250 | 1.800 |", "Trained for 2.25 slots a token", "- steps: 7", "1,234 tokens of text"):
        assert said in card
    assert main(["export", "--load", str(run.checkpoints), "--output", str(tmp_path / "other")]) == 2
    assert "name the directory of the model's tokenizer with --tokenizer-model" in capsys.readouterr().err
