"""Tensors are read as they are stored, and blocks of FP8 become numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.sources import Safetensors

BLOCKS = {"quantization_config": {"weight_block_size": [4, 3]}}


def stored(folder: Path, tensors: dict[str, torch.Tensor], config: dict | None = None) -> Safetensors:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return Safetensors(folder)


def quantised(rows: int, columns: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A weight in blocks of 4 x 3 and its values, element by element."""
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 4), -(-columns // 3)) + 0.5
    values = torch.tensor(
        [[weight[i, j].item() * scales[i // 4, j // 3].item() for j in range(columns)] for i in range(rows)]
    )
    return {"a.weight": weight, "a.weight_scale_inv": scales, "b.weight": torch.ones(2)}, values


@pytest.mark.parametrize("shape", [(8, 9), (10, 7), (3, 2)])
def test_blocks_of_fp8_become_bf16(tmp_path, shape):
    tensors, values = quantised(*shape)
    source = stored(tmp_path, tensors, BLOCKS)
    assert source.names == {"a.weight", "b.weight"}
    assert source.dtype("a.weight") == torch.bfloat16 and source.shape("a.weight") == shape
    assert torch.equal(source.read("a.weight"), values.to(torch.bfloat16))
    assert source.read("b.weight").dtype == torch.float32


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"weight_block_size": [2, 3]}}])
def test_scales_that_do_not_cover_the_weight_are_refused(tmp_path, config):
    source = stored(tmp_path, quantised(8, 9)[0], config)
    with pytest.raises(UsageError, match=r"a\.weight \[8, 9\] has scales \[2, 3\]"):
        source.read("a.weight")


def test_other_types_are_refused(tmp_path):
    tensors = {"a.weight": torch.ones(2, dtype=torch.int8), "b.weight": torch.ones(2).to(torch.float8_e4m3fn)}
    source = stored(tmp_path, tensors)
    for name, kind in (("a.weight", "I8"), ("b.weight", "F8_E4M3")):
        with pytest.raises(UsageError, match=rf"{name} is stored as {kind}"):
            source.dtype(name)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    save_file({"a.weight": torch.ones(2)}, tmp_path / "another.safetensors")
    with pytest.raises(UsageError, match=r"model\.safetensors holds a\.weight, which another file"):
        stored(tmp_path, {"a.weight": torch.ones(2)})
