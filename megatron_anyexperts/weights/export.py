"""Writes a checkpoint as a released model: safetensors, config.json, tokenizer, settings of generation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from megatron_anyexperts.survival.manifest import tracked_checkpoint
from megatron_anyexperts.training import identity
from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.checkpoint_stream import CheckpointReader
from megatron_anyexperts.weights.conversion import refuse_differences
from megatron_anyexperts.weights.families.known import read_config
from megatron_anyexperts.weights.families.rows import PREFIX, Mapped, copies, mapping
from megatron_anyexperts.weights.released import load_config, stored_as, write_companions

_INDEX = "model.safetensors.index.json"


def export_weights(source: Path, config_path: Path, target: Path) -> list[Path]:
    """Turn a checkpoint into a Hugging Face directory, one file per block.

    Args:
        source: checkpoint directory, as for `--load`; its newest checkpoint is taken.
        config_path: config.json of the architecture; the tokenizer and the settings of generation beside it are copied.
        target: new directory.

    Returns:
        the weight files.

    Raises:
        UsageError: the checkpoint holds what the architecture has no place for, or lacks something (all are listed);
            the target has weights already.
    """
    config = load_config(config_path)
    model, table = read_config(config)
    reader = CheckpointReader(source)
    boxes, repeats = list(mapping(table, model)), copies(table, model)
    _refuse_tensors(source, reader, boxes)
    refuse_tokenizer(
        source, config_path.parent, "config.json beside the right one with --hf-config (an import has it in hf/)"
    )
    groups = _by_block(boxes)
    paths, main = save_groups(target, [partial(_tensors, reader, group, repeats) for group in groups])
    write_companions(stored_as(config, main), config_path.parent, target)
    return paths


def save_groups(target: Path, groups: Sequence[Callable[[], Iterable[tuple[str, Tensor]]]]) -> tuple[list[Path], str]:
    """Write each group of named tensors as a safetensors file, one after the other, and their index.

    Returns:
        the files, and the type of most values.

    Raises:
        UsageError: the target has weights already.
    """
    if any(target.glob("*.safetensors")):
        raise UsageError(f"{target} has *.safetensors files already; name a new directory with --output")
    target.mkdir(parents=True, exist_ok=True)
    paths, index, types = [], {}, Counter()
    for number, group in enumerate(groups, 1):
        path = target / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = dict(group())
        save_file(tensors, path, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, path.name)
        types.update({tensor.dtype: tensor.numel() for tensor in tensors.values()})
        paths.append(path)
    size = sum(path.stat().st_size for path in paths)
    (target / _INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=1))
    return paths, str(types.most_common(1)[0][0]).removeprefix("torch.")


def refuse_tokenizer(source: Path, folder: Path, way_out: str) -> None:
    """The tokenizer that goes out must be the one that the weights know.

    Args:
        way_out: what to name instead.
    """
    known = (identity.read(tracked_checkpoint(source)) or {}).get("tokenizer_model")
    found = identity.tokenizer_fingerprint(str(folder))
    if known and found and known != found:
        raise UsageError(
            f"the weights of {source} go with the tokenizer of content {known}, {folder} holds {found}; name the "
            f"{way_out}"
        )


def _refuse_tensors(source: Path, reader: CheckpointReader, boxes: Sequence[Mapped]) -> None:
    found = {key: reader.shape(key) for key in reader.tensors}
    expected = {box.key: box.whole for box in boxes}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        # Megatron pads the vocabulary to what tensor parallelism divides; the padding is never a target.
        key = f"{PREFIX}{name}"
        if key in found and key in expected and found[key][0] >= expected[key][0]:
            found[key] = expected[key]
    for box in boxes:
        if not box.names:
            found.setdefault(box.key, box.whole)
    refuse_differences(source, found, expected)


def _tensors(
    reader: CheckpointReader, boxes: Iterable[Mapped], repeats: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    again = {original: [name for name in repeats if repeats[name] == original] for original in repeats.values()}
    for box in boxes:
        parts = box.split(reader.read(box.key, box.offset, box.shape)) if box.names else ()
        for (name, shape), part in zip(box.names.items(), parts, strict=True):
            for written in (name, *again.get(name, ())):
                yield written, part.reshape(shape).clone()


def _by_block(boxes: Sequence[Mapped]) -> list[list[Mapped]]:
    """Group boxes of one layer over there, which are neighbours; what lies outside of layers is a group alone."""
    groups: dict[str, list[Mapped]] = {}
    for box in boxes:
        name = next(iter(box.names), None)
        if name is not None:
            words = name.split(".")
            groups.setdefault(".".join(words[:3]) if words[1] == "layers" else name, []).append(box)
    return list(groups.values())
