"""Carries weights of `BailingMoeV2` models (Ling 2.0) between Hugging Face files and our checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_anyexperts.training import identity
from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.bailing import Bailing, Mapped, mapping
from megatron_anyexperts.weights.checkpoint_stream import CheckpointReader, Chunk, write_release

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Weights:
    """Tensors of a directory of safetensors files; one tensor is read at a time."""

    def __init__(self, folder: Path):
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise UsageError(f"{folder} has no *.safetensors files")
        try:
            self._files = [safe_open(path, framework="pt") for path in paths]
        except SafetensorError as error:
            raise UsageError(f"{folder}: {error}") from error
        self._home = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118
        self.names = set(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._home[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        stored = self._home[name].get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise UsageError(f"{name} is stored as {stored}; convert weights to one of {', '.join(_DTYPES)} first")
        return _DTYPES[stored]

    def read(self, name: str) -> Tensor:
        return self._home[name].get_tensor(name)


def _read_config(path: Path) -> tuple[dict[str, Any], Bailing]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    return config, Bailing.from_config(config)


def _refuse_differences(
    where: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    lines = [f"unknown: {name} {list(found[name])}" for name in sorted(found.keys() - expected.keys())]
    lines += [f"missing: {name} {list(expected[name])}" for name in sorted(expected.keys() - found.keys())]
    lines += [
        f"shape: {name} is {list(found[name])}, config.json says {list(expected[name])}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    if lines:
        listed = "\n  ".join(lines)
        raise UsageError(f"{where} does not hold the tensors of its architecture; nothing was written\n  {listed}")


def import_weights(source: Path, target: Path) -> Path:
    """Turn a Hugging Face directory into a checkpoint for `--load`.

    Every tensor keeps its values and its type, except for the expert bias, which becomes fp32.

    Args:
        source: directory with config.json and safetensors files.
        target: new checkpoint directory; `model.yaml` in it holds the matching Megatron flags.

    Returns:
        the directory with the tensors.

    Raises:
        UsageError: another architecture; unknown, missing or misshapen tensors (all are listed); a checkpoint exists.
    """
    _, sizes = _read_config(source / "config.json")
    weights = _Weights(source)
    boxes = list(mapping(sizes))
    expected = {name: shape for box in boxes for name, shape in box.names.items()}
    _refuse_differences(source, {name: weights.shape(name) for name in weights.names}, expected)

    def make(box: Mapped, dtype: torch.dtype) -> Tensor:
        return box.join([weights.read(name) for name in box.names]).to(dtype)

    def chunk(box: Mapped) -> Chunk:
        dtype = box.dtype or weights.dtype(next(iter(box.names)))
        return Chunk(box.key, box.whole, box.offset, box.shape, dtype, partial(make, box, dtype))

    architecture = sizes.pattern, sizes.hidden_size, sizes.num_attention_heads
    settings = identity.of_flags(sizes.flags())
    written = write_release(target, [chunk(box) for box in boxes], *architecture, settings)
    (target / "model.yaml").write_text(yaml.safe_dump(sizes.flags(), sort_keys=False))
    return written


def export_weights(source: Path, config_path: Path, target: Path) -> list[Path]:
    """Turn a checkpoint into a Hugging Face directory, one file per block.

    Args:
        source: checkpoint directory, as for `--load`; its newest checkpoint is taken.
        config_path: config.json of the architecture; it is copied.
        target: new directory.

    Returns:
        the weight files.

    Raises:
        UsageError: the checkpoint holds what the architecture has no place for, or lacks something (all are listed);
            the target has weights already.
    """
    config, sizes = _read_config(config_path)
    reader = CheckpointReader(source)
    boxes = list(mapping(sizes))
    found = {key: reader.shape(key) for key in reader.tensors}
    expected = {box.key: box.whole for box in boxes}
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        # Megatron pads the vocabulary to what tensor parallelism divides; the padding is never a target.
        key = f"language_model.{key}"
        if key in found and found[key][0] >= expected[key][0]:
            found[key] = expected[key]
    for box in boxes:
        if not box.names:
            found.setdefault(box.key, box.whole)
    _refuse_differences(source, found, expected)
    if any(target.glob("*.safetensors")):
        raise UsageError(f"{target} has *.safetensors files already; name a new directory with --save")
    target.mkdir(parents=True, exist_ok=True)
    groups = _by_block(boxes)
    paths, index = [], {}
    for number, group in enumerate(groups, 1):
        path = target / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = dict(_split(reader, group))
        save_file(tensors, path, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, path.name)
        paths.append(path)
    size = sum(path.stat().st_size for path in paths)
    (target / _INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=1))
    if config_path.resolve() != (target / "config.json").resolve():
        shutil.copyfile(config_path, target / "config.json")
    return paths


def _split(reader: CheckpointReader, boxes: Iterable[Mapped]) -> Iterator[tuple[str, Tensor]]:
    for box in boxes:
        parts = box.split(reader.read(box.key, box.offset, box.shape)) if box.names else ()
        for (name, shape), part in zip(box.names.items(), parts, strict=True):
            yield name, part.reshape(shape).clone()


def _by_block(boxes: Sequence[Mapped]) -> list[list[Mapped]]:
    """Group boxes of one Hugging Face layer, which are neighbours; what lies outside of layers is a group alone."""
    groups: dict[str, list[Mapped]] = {}
    for box in boxes:
        name = next(iter(box.names), None)
        if name is not None:
            words = name.split(".")
            groups.setdefault(".".join(words[:3]) if words[1] == "layers" else name, []).append(box)
    return list(groups.values())
