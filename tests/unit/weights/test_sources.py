"""Tensors are read as they are stored, and blocks of FP8 become numbers."""

import pytest
import torch
from safetensors.torch import save_file

from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.sources import Safetensors

BLOCKS = {"quantization_config": {"weight_block_size": [4, 3]}}


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
    save_file(tensors, tmp_path / "model.safetensors")
    source = Safetensors(tmp_path, BLOCKS)
    assert source.names == {"a.weight", "b.weight"}
    assert source.dtype("a.weight") == torch.bfloat16 and source.shape("a.weight") == shape
    assert torch.equal(source.read("a.weight"), values.to(torch.bfloat16))
    assert source.read("b.weight").dtype == torch.float32


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"weight_block_size": [2, 3]}}])
def test_scales_that_do_not_cover_the_weight_are_refused(tmp_path, config):
    save_file(quantised(8, 9)[0], tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"a\.weight \[8, 9\] has scales \[2, 3\]"):
        Safetensors(tmp_path, config).read("a.weight")


def test_other_types_are_refused(tmp_path):
    tensors = {"a.weight": torch.ones(2, dtype=torch.int8), "b.weight": torch.ones(2).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = Safetensors(tmp_path, {})
    for name, stored in (("a.weight", "I8"), ("b.weight", "F8_E4M3")):
        with pytest.raises(UsageError, match=rf"{name} is stored as {stored}"):
            source.dtype(name)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for number in range(2):
        save_file({"a.weight": torch.ones(2)}, tmp_path / f"{number}.safetensors")
    with pytest.raises(UsageError, match=r"1\.safetensors holds a\.weight, which another file"):
        Safetensors(tmp_path, {})
