"""Every shipped configuration trains over Transformer Engine, saves, changes its layout and goes on, FP8 included."""

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from megatron_anyexperts.training.config_files import read_config
from megatron_anyexperts.training.pretrain import UNSAFE_PICKLES
from tests.end_to_end.dumping_pretrain import live_state
from tests.end_to_end.launch import ROOT, pretrain
from tests.end_to_end.proxies import proxy
from tests.end_to_end.test_configurations import CONFIGS, EP2, FOUR

ENTRY = ROOT / "tests/te/counting_pretrain.py"
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PRECISIONS = {
    "bf16": {},
    "tensorwise": {"fp8-format": "hybrid", "fp8-recipe": "tensorwise"},
    "delayed": {"fp8-format": "hybrid", "fp8-recipe": "delayed"},
}
# One for every change of the code; the others tell of the files.
DAILY = ("ling_mini_2_0_anyexperts", "tensorwise")
CASES = [
    (config, precision)
    for config in CONFIGS
    if read_config(str(config)).get("transformer-impl") != "local"
    for precision in PRECISIONS
]


def settings(path: Path, precision: str) -> dict:
    """The proxy of a configuration at a precision; Megatron refuses recomputation under delayed scaling."""
    config = proxy(read_config(str(path)), transformer_engine=True) | PRECISIONS[precision]
    if precision == "delayed":
        config = {key: value for key, value in config.items() if not key.startswith("recompute")}
    return config


@pytest.mark.parametrize(
    ("path", "precision"),
    [
        pytest.param(path, precision, marks=() if (path.stem, precision) == DAILY else pytest.mark.slow)
        for path, precision in CASES
    ],
    ids=[f"{path.stem}-{precision}" for path, precision in CASES],
)
def test_configuration_trains_saves_and_goes_on_over_transformer_engine(corpus, path, precision, tmp_path, monkeypatch):
    config = tmp_path / path.name
    config.write_text(yaml.safe_dump(settings(path, precision)))
    ranks, ep2 = EP2
    whole = pretrain(corpus, tmp_path / "run", *FOUR, *ep2, ranks=ranks, entry=ENTRY, config=config)
    assert list(whole.losses) == [1, 2, 3, 4]
    casts = [int(number) for number in re.findall(r"casts to FP8: (\d+)", whole.output + whole.log)]
    assert casts and all(bool(number) == (precision != "bf16") for number in casts)
    # Training says what resuming will need.
    assert (UNSAFE_PICKLES in whole.output + whole.log) == (precision == "delayed")
    monkeypatch.setenv(UNSAFE_PICKLES, "1")
    before = live_state(whole.run.root / "live_saved/2")
    assert {"weight", "param", "exp_avg", "exp_avg_sq"} <= {key[-1] for key in before}
    trained = [key for key in before if key[-1] == "exp_avg"]
    assert sum(bool(before[key].any()) for key in trained) > 0.9 * len(trained)
    shutil.rmtree(whole.run.checkpoints / "iter_0000004")

    for name, (ranks, flags) in {"EP1": (1, ()), "TP2": (2, TP2)}.items():
        shutil.copytree(whole.run.root, tmp_path / name)
        resumed = pretrain(corpus, tmp_path / name, *FOUR, *flags, ranks=ranks, entry=ENTRY, config=config)
        if name == "EP1":  # tensor parallelism cuts tensors, so that pieces have other sizes
            after = live_state(resumed.run.root / "live_loaded")
            assert before.keys() == after.keys()
            assert [key for key, values in before.items() if not torch.equal(values, after[key])] == []
        for iteration in (3, 4):
            close = math.isclose(resumed.losses[iteration], whole.losses[iteration], rel_tol=5e-3)
            assert close, (name, iteration, resumed.losses, whole.losses)
