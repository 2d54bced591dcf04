"""Carries weights of released language models into our checkpoints and back; `families` says which, and how."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import Tensor

from megatron_anyexperts.training import identity
from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.checkpoint_stream import Chunk, write_release
from megatron_anyexperts.weights.families.known import read_config
from megatron_anyexperts.weights.families.rows import Mapped, copies, mapping
from megatron_anyexperts.weights.gguf_file import GgufFile, tokenizer_of
from megatron_anyexperts.weights.new_tokens import extend
from megatron_anyexperts.weights.released import FOLDER, write_companions
from megatron_anyexperts.weights.sources import Safetensors, Source


def refuse_differences(
    where: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare tensors by name and shape.

    Raises:
        UsageError: they differ; every unknown, missing and misshapen tensor is listed.
    """
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


def import_weights(source: Path, target: Path, add_tokens: bool = False) -> Path:
    """Turn a Hugging Face directory into a checkpoint for `--load`.

    Every tensor keeps its values and its type, except for the expert bias, which becomes fp32, and FP8 weights, which
    become bf16. Tensors of a GGUF file become fp32.

    Args:
        source: directory with config.json and safetensors files, or a GGUF file.
        target: new checkpoint directory; `model.yaml` in it holds the matching Megatron flags, and `hf/` the files
            beside the weights: the tokenizer for training, and all that export needs.
        add_tokens: give the tokenizer what it lacks for media and chat, see `new_tokens`.

    Returns:
        the directory with the tensors.

    Raises:
        UsageError: another architecture; unknown, missing or misshapen tensors (all are listed); a checkpoint exists.
    """
    weights: Source = GgufFile(source) if source.is_file() else Safetensors(source)
    config = weights.config
    model, table = read_config(config)
    boxes = list(mapping(table, model))
    _refuse_tensors(source, weights, boxes, copies(table, model), table.bookkeeping, model.tied)

    def make(box: Mapped, dtype: torch.dtype) -> Tensor:
        return box.join([weights.read(name) for name in box.names]).to(dtype)

    def chunk(box: Mapped) -> Chunk:
        dtype = box.dtype or _dtype(weights, box.names)
        return Chunk(box.key, box.whole, box.offset, box.shape, dtype, partial(make, box, dtype))

    with tempfile.TemporaryDirectory() as scratch:
        companions = source
        if isinstance(weights, GgufFile):
            companions = Path(scratch) / "found"
            tokenizer_of(source).save_pretrained(companions)
        extended = extend(companions, Path(scratch) / "extended", model.vocabulary) if add_tokens else None
        tokens = extended.folder if extended else companions
        flags, rows = model.flags(), extended.rows if extended else model.vocabulary
        settings = identity.of_flags(flags)
        if fingerprint := identity.tokenizer_fingerprint(str(tokens)):
            settings["tokenizer_model"] = fingerprint
        shaped = map(extended.grown, boxes) if extended else boxes
        written = write_release(target, map(chunk, shaped), model.pattern, model.hidden, model.heads, settings)
        static = {"padded-vocab-size": rows} | ({"anyexperts-alpha": 0.0} if model.mixture else {})
        (target / "model.yaml").write_text(yaml.safe_dump(flags | static, sort_keys=False))
        write_companions(config, companions, target / FOLDER, extended)
    if extended:
        print(extended.said(model.vocabulary))
    if isinstance(weights, GgufFile):
        stored = ", ".join(f"{count} {kind}" for kind, count in sorted(weights.quantised().items()))
        print(f"all tensors are fp32 now; they were {stored}")
    return written


def _dtype(weights: Source, names: Iterable[str]) -> torch.dtype:
    found = {name: weights.dtype(name) for name in names}
    if len(set(found.values())) > 1:
        raise UsageError(f"tensors that become one here are stored in different types: {found}")
    return next(iter(found.values()))


def _refuse_tensors(
    where: Path, weights: Source, boxes: Sequence[Mapped], repeats: Mapping[str, str], idle: str, tied: bool
) -> None:
    """Every tensor must be known and in its shape, and what repeats another one must equal it."""
    expected = {name: shape for box in boxes for name, shape in box.names.items()}
    skipped = {name for name in weights.names - expected.keys() if re.fullmatch(idle, name)}
    repeats = dict(repeats)
    if tied and "lm_head.weight" in weights.names:  # some writers store the tied layer as well
        repeats["lm_head.weight"] = next(iter(boxes[0].names))
    found = {name: weights.shape(name) for name in weights.names - skipped}
    refuse_differences(where, found, expected | {name: expected[original] for name, original in repeats.items()})
    for name, original in repeats.items():
        if not torch.equal(weights.read(name), weights.read(original)):
            raise UsageError(f"{where}: {name} must equal {original}, whose place it shares here, and differs")
    if skipped:
        print(f"left out, since they are computed: {len(skipped)} tensors such as {min(skipped)}")
