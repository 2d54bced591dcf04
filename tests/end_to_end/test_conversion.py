"""The Ling-mini-2.0 proxies train; the fixed one becomes a dynamic mixture and goes on where it was."""

import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import yaml

from megatron_anyexperts.survival import runlog
from megatron_anyexperts.training.config_files import read_config
from megatron_anyexperts.weights.families.known import read_config as read_released
from tests.end_to_end.launch import ROOT, Finished, pretrain, start_ranks
from tests.unit.weights.reference import TINY, random_weights, write

CONFIGS = ROOT / "pretrain/configs"
FIXED, DYNAMIC = (CONFIGS / f"ling_mini_2_0_{name}proxy_cpu.yaml" for name in ("", "anyexperts_"))
LING = TINY | {
    "vocab_size": 157184,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "moe_intermediate_size": 512,
    "max_position_embeddings": 32768,
}
"""config.json of Ling-mini-2.0, as far as it counts."""
ON_GPUS = """
transformer-impl: transformer_engine
moe-grouped-gemm: true
recompute-granularity: selective
recompute-modules: [moe_act, layernorm]
expert-model-parallel-size: 8
"""
"""What a configuration for GPUs has in common with the large ones."""
ONLY_ON_CPU = (
    *("distributed-backend", "use-cpu-initialization", "no-persist-layer-norm", "no-rope-fusion"),
    *("no-masked-softmax-fusion", "no-bias-dropout-fusion", "no-bias-swiglu-fusion", "disable-jit-fuser"),
    "no-gradient-accumulation-fusion",
)
"""What it has not."""


def run(script: str, *words, code: int = 0) -> str:
    process = start_ranks(ROOT / "pretrain" / script, 1, list(map(str, words)))[0]
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output[-3000:]
    return output


@pytest.fixture(scope="module")
def proxies(corpus: Path, tmp_path_factory) -> dict[Path, Finished]:
    """Both CPU proxies after 12 iterations, by configuration."""
    folder, steps = tmp_path_factory.mktemp("proxies"), ("--train-iters", "12", "--save-interval", "12")
    return {config: pretrain(corpus, folder / config.stem, *steps, config=config) for config in (FIXED, DYNAMIC)}


@pytest.mark.parametrize("config", [FIXED, DYNAMIC], ids=["fixed", "dynamic"])
def test_proxy_trains_and_keeps_its_budget(proxies: dict[Path, Finished], config: Path):
    losses, flags = proxies[config].losses, read_config(str(config))
    assert losses[12] < losses[1] - 0.5
    # Without its controllers the dynamic proxy stays at 5.1 slots, of which 5.0 are real.
    for name, target in (("slots", "anyexperts-target-slots"), ("real", "anyexperts-target-real")):
        late = [record["routing"]["all"][name] for record in runlog.read_metrics(proxies[config].run)][5:]
        assert mean(late) == pytest.approx(flags.get(target, flags["moe-router-topk"]), abs=0.5), name
    for layer in runlog.read_metrics(proxies[config].run)[-1]["routing"]["layers"].values():
        assert (layer["all"]["virtual"] > 0) == (config == DYNAMIC)


@pytest.fixture(scope="module")
def upcycled(corpus: Path, proxies: dict[Path, Finished], tmp_path_factory) -> Path:
    """The trained fixed proxy as a dynamic one: weights without a training state."""
    folder, config = tmp_path_factory.mktemp("upcycled"), tmp_path_factory.mktemp("config") / "on_gpus.yaml"
    config.write_text(f"base: {DYNAMIC}\n{ON_GPUS}" + "".join(f"{key}: null\n" for key in ONLY_ON_CPU))
    words = ("--tokenizer-model", corpus / "tokenizer", "--run-dir", proxies[FIXED].run.root, "--save", folder)
    refused = run("upcycle.py", "--config", config, *words, "--rotary-base", "500", code=2)
    assert "--rotary-base 600000 in the checkpoint, 500 now" in refused
    run("upcycle.py", "--config", config, *words)
    return folder


def test_upcycled_model_answers_with_the_slots_it_had(corpus: Path, upcycled: Path, tmp_path: Path):
    data = ("--data-path", corpus / "shards/blend.yaml", "--tokenizer-model", corpus / "tokenizer")
    ask = ("--config", DYNAMIC, *data, "--prompt", "a boat", "--max-new-tokens", 2)
    output = run("generate.py", *ask, "--load", upcycled)
    # A new model would give 5 or 6.
    (prompt,) = [line for line in output.splitlines() if line.startswith("  prompt: ")]
    assert set(re.findall(r"\d\.\d\d", prompt)) == {"4.00"}
    assert f"taking the weights of {upcycled / 'release'}; the settings are those" in output
    output = run("generate.py", *ask, "--load", tmp_path, "--finetune", code=2)
    assert f"no checkpoint in {tmp_path}" in output


def test_upcycled_model_goes_on_without_a_jump(
    corpus: Path, proxies: dict[Path, Finished], upcycled: Path, tmp_path: Path
):
    checkpoints = proxies[FIXED].run.checkpoints
    steps = ["--train-iters", "6", "--lr-warmup-iters", "0", "--finetune"]
    fixed = pretrain(corpus, tmp_path / "fixed", *steps, "--load", str(checkpoints), config=FIXED)
    words = ["--load", str(upcycled), "--expert-model-parallel-size", "2"]
    dynamic = pretrain(corpus, tmp_path / "dynamic", *steps, *words, config=DYNAMIC, ranks=2)
    # The first step sees the same data with the same weights.
    assert abs(dynamic.losses[1] - fixed.losses[1]) < 1e-4
    assert dynamic.losses[6] < dynamic.losses[1]
    assert abs(dynamic.losses[6] - fixed.losses[6]) < 0.2


def test_converter_imports_refuses_and_exports_from_the_command_line(tmp_path: Path):
    weights = random_weights(TINY)
    write(tmp_path / "hf", TINY, weights)
    ours = tmp_path / "ours/checkpoints"
    run("convert_checkpoint.py", "import", "--hf", tmp_path / "hf", "--save", ours)
    assert yaml.safe_load((ours / "model.yaml").read_text())["num-experts"] == TINY["num_experts"]
    config = tmp_path / "hf/config.json"
    run(
        *(
            "convert_checkpoint.py",
            "export",
            "--run-dir",
            tmp_path / "ours",
            "--hf-config",
            config,
            "--save",
            tmp_path / "x",
        )
    )
    del weights["lm_head.weight"]
    write(tmp_path / "bad", TINY, weights)
    command = [sys.executable, ROOT / "pretrain/convert_checkpoint.py", "import", "--hf", tmp_path / "bad"]
    refused = subprocess.run([*command, "--save", tmp_path / "y"], capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 2
    assert "missing: lm_head.weight [96, 32]" in refused.stderr


def test_ling_configuration_is_its_architecture():
    flags = read_released(LING)[0].flags()
    for name in ("ling_mini_2_0", "ling_mini_2_0_anyexperts"):
        config = read_config(str(CONFIGS / f"{name}.yaml"))
        assert {key: config[key] for key in flags} == flags
