"""Tensors of a released model, one at a time: a folder of safetensors files, quantised to FP8 or not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.released import load_config

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FP8, _SCALE = "F8_E4M3", "_scale_inv"


class Source(Protocol):
    """What holds the tensors of a released model."""

    names: set[str]
    config: dict[str, Any]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Type in which `read` gives it."""

    def read(self, name: str) -> Tensor:
        """Read one tensor."""


class Safetensors:
    """Tensors of a directory of safetensors files; one tensor is read at a time.

    Weights in blocks of FP8, each block with a scale beside the weight (DeepSeek-V3), become bf16 as they are read.

    Args:
        folder: holds config.json and `*.safetensors`.

    Attributes:
        names: tensors, without the scales.
        config: the parsed config.json.

    Raises:
        UsageError: no file, a damaged one, or a tensor in two files.
    """

    def __init__(self, folder: Path):
        self.config = load_config(folder / "config.json")
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise UsageError(f"{folder} has no *.safetensors files")
        self._home: dict[str, Any] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise UsageError(f"{path}: {error}") from error
            names = set(file.keys())
            if twice := sorted(names & self._home.keys()):
                raise UsageError(f"{path.name} holds {twice[0]}, which another file of {folder} holds as well")
            self._home |= dict.fromkeys(names, file)
        quantised = self.config.get("quantization_config") or {}
        self._block = quantised.get("weight_block_size")
        scales = {name for name in self._home if name.endswith(_SCALE) and name.removesuffix(_SCALE) in self._home}
        self.names = set(self._home) - scales
        self._scaled = {name.removesuffix(_SCALE) for name in scales}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._home[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type in which `read` gives it.

        Raises:
            UsageError: it is stored as something else than floating-point numbers or blocks of FP8.
        """
        stored = self._home[name].get_slice(name).get_dtype()
        if stored == _FP8 and name in self._scaled:
            return torch.bfloat16
        if stored not in _DTYPES or name in self._scaled:
            raise UsageError(
                f"{name} is stored as {stored}; convert weights to {', '.join(_DTYPES)} or {_FP8} with a scale for "
                f"each block ({name}{_SCALE}) first"
            )
        return _DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            UsageError: the scales of an FP8 weight do not cover it.
        """
        tensor = self._home[name].get_tensor(name)
        if name not in self._scaled:
            return tensor
        return self._dequantised(name, tensor).to(self.dtype(name))

    def _dequantised(self, name: str, tensor: Tensor) -> Tensor:
        scale_name = name + _SCALE
        scales = self._home[scale_name].get_tensor(scale_name).float()
        blocks = self._block or [None]
        whole = [math.ceil(size / block) for size, block in zip(tensor.shape, blocks, strict=False) if block]
        if len(blocks) != 2 or tensor.dim() != 2 or list(scales.shape) != whole:
            raise UsageError(
                f"{name} {list(tensor.shape)} has scales {list(scales.shape)}, but quantization_config in config.json "
                f"says weight_block_size={self._block}"
            )
        for dim, block in enumerate(blocks):
            scales = scales.repeat_interleave(block, dim).narrow(dim, 0, tensor.shape[dim])
        return tensor.float() * scales
