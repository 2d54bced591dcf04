"""Starts a mixture from a trained model: a fixed top-k mixture becomes a dynamic one, a dense model becomes a mixture.

The new model's first forward pass is the old model's. Tensors that both have are copied; the rest is initialised so
that it has no effect yet, but can learn: fusion has a gradient at once, importance from the second step on, and
controllers move the slot offset and the virtual bias.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from megatron_anyexperts.moe.config import AnyExpertsConfig
from megatron_anyexperts.moe.controllers import VIRTUAL_BIAS_LIMIT
from megatron_anyexperts.moe.layer import AnyExpertsMoELayer
from megatron_anyexperts.moe.slots import integer_slots, soft_slots
from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.checkpoint_stream import CheckpointReader, Chunk, write_release

START_IMPORTANCE = 0.5
"""Importance of every token at the start."""

_NEW = ("vision.", "audio.")
_LEARNED = re.compile(r"\.mlp\.(importance\.|router\.virtual_weight)")
_ROUTING = re.compile(r"\.mlp\.(importance\.|virtual\.|router\.(virtual_weight|expert_bias|control\.))")


def start_offset(config: AnyExpertsConfig) -> float:
    """The slot offset at which a token of importance `START_IMPORTANCE` has exactly `moe_router_topk` slots.

    Raises:
        UsageError: the slot range does not contain the top-k.
    """
    k_min, k_max, topk = config.anyexperts_k_min, config.anyexperts_k_max, config.moe_router_topk
    if not k_min <= topk <= k_max:
        raise UsageError(
            f"anyexperts_k_min={k_min}, anyexperts_k_max={k_max}: the range must contain moe_router_topk={topk}, the "
            "slots that the old model gives every token"
        )
    if k_min == k_max:
        return 0.0
    offset = torch.tensor((topk - k_min) / (k_max - k_min) - START_IMPORTANCE)
    importance = torch.tensor([START_IMPORTANCE])
    for _ in range(8):  # fp32 may round to a neighbour of top-k; the next offsets below are tried
        soft = soft_slots(importance, offset, k_min, k_max)
        if soft.item() == topk and integer_slots(soft, "fractional").item() == topk:
            return offset.item()
        offset = torch.nextafter(offset, torch.tensor(-1.0 if soft.item() > topk else 1.0))
    raise UsageError(f"no offset gives exactly {topk} slots in [{k_min}, {k_max}]; use another slot range")


@torch.no_grad()
def make_neutral(layer: AnyExpertsMoELayer) -> None:
    """Initialise what a fixed top-k layer lacks so that the layer computes what that one does, and can learn.

    - Importance: the last projection is 0, so every token has importance 0.5.
    - Fusion: alpha is 0; being learned it has a gradient, and through it importance has one a step later.
    - Slot offset: 0.5 of importance means top-k slots.
    - Virtual columns: weight 0, and the bias at its lower limit, from where the controller raises it.

    Raises:
        UsageError: a setting would change the first forward pass; says which.
    """
    config = layer.config
    if config.anyexperts_alpha and not config.anyexperts_learn_alpha:
        raise UsageError(
            f"anyexperts_alpha={config.anyexperts_alpha} would change the hidden states at once; add "
            "--anyexperts-learn-alpha, which starts it at 0 here, or use --anyexperts-alpha 0"
        )
    if layer.importance is not None:
        layer.importance.up.zero_()
        layer.importance.up_bias.zero_()
        if layer.importance.alpha is not None:
            layer.importance.alpha.zero_()
    layer.router.control.slot_offset.fill_(start_offset(config))
    if layer.router.virtual_weight is not None:
        layer.router.virtual_weight.zero_()
        layer.router.control.virtual_bias.fill_(-VIRTUAL_BIAS_LIMIT)


def upcycle(
    model: torch.nn.Module, source: Path, target: Path, settings: Mapping[str, Any] | None = None
) -> Path:
    """Write a checkpoint of `model` that starts from an older, simpler model's weights.

    What the source lacks: importance and virtual columns start neutral; experts are copies of the dense FFN of the same
    layer, behind a router that keeps its random initialisation; shared experts of a formerly dense layer start at 0
    output; encoders keep their random initialisation.

    Args:
        model: the new model in one process, without wrappers; its values are changed.
        source: checkpoint directory of the old model, as for `--load`.
        target: new checkpoint directory.
        settings: see `write_release`.

    Returns:
        the directory with the tensors.

    Raises:
        UsageError: tensors that neither model explains (all are listed), or settings that change the first forward
            pass.
    """
    reader = CheckpointReader(source)
    learned = [key for key in reader.tensors if _LEARNED.search(key)]
    if learned:
        raise UsageError(f"{source} is dynamic already ({learned[0]}); continue it with --load and the new settings")
    for layer in (module for module in model.modules() if isinstance(module, AnyExpertsMoELayer)):
        make_neutral(layer)
    chunks, used, problems = [], set(), []
    for box in _boxes(model):
        chunk, key, problem = _choose(box, reader, model.config)
        used.add(key)
        problems += [problem] if problem else []
        chunks.append(chunk)
    problems += [
        f"not in the new model: {key} {list(reader.shape(key))}" for key in sorted(reader.tensors.keys() - used)
    ]
    if problems:
        listed = "\n  ".join(dict.fromkeys(problems))
        raise UsageError(f"{source} does not fit the new model; nothing was written\n  {listed}")
    config = model.config
    pattern = model.language_model.hybrid_layer_pattern
    return write_release(target, chunks, pattern, config.hidden_size, config.num_attention_heads, settings)


def _boxes(model: torch.nn.Module) -> Iterator[ShardedTensor]:
    state = model.sharded_state_dict()
    apply_factories(state)
    return (value for value in nested_values(state) if isinstance(value, ShardedTensor))


def _chunk(box: ShardedTensor, make, dtype: torch.dtype) -> Chunk:
    lead = (1,) * box.prepend_axis_num
    shape = (*lead, *box.local_shape)
    return Chunk(
        box.key,
        tuple(box.global_shape),
        tuple(box.global_offset),
        shape,
        dtype,
        lambda: make().view(shape),
    )


def _choose(
    box: ShardedTensor, reader: CheckpointReader, config: AnyExpertsConfig
) -> tuple[Chunk, str | None, str | None]:
    """Say where one box of the new model comes from: its chunk, the source's key, and a problem."""
    fresh = _chunk(box, lambda: box.data, box.data.dtype)
    key = box.key
    if key in reader.tensors:
        if reader.shape(key) != tuple(box.global_shape):
            return fresh, key, f"shape: {key} is {list(reader.shape(key))}, the new model has {list(box.global_shape)}"
        if ".router.control." in key:
            return fresh, key, None
        shape = (1,) * box.prepend_axis_num + tuple(box.local_shape)
        return _chunk(box, partial(reader.read, key, tuple(box.global_offset), shape), reader.dtype(key)), key, None
    if key.startswith(_NEW) or _ROUTING.search(key):
        return fresh, None, None
    dense = _from_dense(box, reader, config)
    return dense or (fresh, None, f"missing: {key} {list(box.global_shape)}")


def _from_dense(
    box: ShardedTensor, reader: CheckpointReader, config: AnyExpertsConfig
) -> tuple[Chunk, str | None, str | None] | None:
    """Take a box of a mixture layer from the dense layer in its place; None if it is no such box."""
    layer, found, name = box.key.rpartition(".pre_mlp_layernorm.weight")
    if found:
        dense = f"{layer}.mlp.linear_fc1.layer_norm_weight"
        if dense in reader.tensors:
            return _chunk(box, partial(reader.read, dense), reader.dtype(dense)), dense, None
        return None
    layer, found, name = box.key.partition(".mlp.")
    if f"{layer}.mlp.linear_fc1.weight" not in reader.tensors:
        return None
    if name == "router.weight" or name.startswith("shared_experts.linear_fc1"):
        return _chunk(box, lambda: box.data, box.data.dtype), None, None
    if name.startswith("shared_experts."):
        return _chunk(box, lambda: torch.zeros_like(box.data), box.data.dtype), None, None
    if not name.startswith("experts.experts."):
        return None
    dense = f"{layer}.mlp.{name.removeprefix('experts.experts.')}"
    if not _normalised(config):
        problem = (
            "gates: copies of a dense layer add up to it only if the gates of a token have a fixed sum; use sigmoid "
        )
        problem += "scores or softmax without --moe-router-pre-softmax, and a top-k of at least 2"
        return _chunk(box, lambda: box.data, box.data.dtype), dense, problem
    expected = tuple(box.global_shape[1:])
    if reader.shape(dense) != expected:
        problem = (
            f"shape: {dense} is {list(reader.shape(dense))}, an expert is {list(expected)}; "
            "set --moe-ffn-hidden-size to the dense --ffn-hidden-size"
        )
        return _chunk(box, lambda: box.data, box.data.dtype), dense, problem
    scale = (config.moe_router_topk_scaling_factor or 1.0) if name.endswith("linear_fc2.weight") else 1.0
    make = partial(_scaled, reader, dense, tuple(box.global_offset[1:]), tuple(box.local_shape), scale)
    return _chunk(box, make, reader.dtype(dense)), dense, None


def _normalised(config: AnyExpertsConfig) -> bool:
    softmax = config.moe_router_score_function == "softmax"
    return not config.moe_router_pre_softmax if softmax else config.moe_router_topk > 1


def _scaled(
    reader: CheckpointReader, key: str, offset: tuple[int, ...], shape: tuple[int, ...], scale: float
) -> Tensor:
    """Gates sum to the scaling factor, so the last matrix of each copy is divided by it."""
    data = reader.read(key, offset, shape)
    return data if scale == 1.0 else data / scale
