"""States of the distributed optimizer as checkpoints hold them, written and read by each rank for its own part alone.

A rank of Megatron's distributed optimizer owns a range of each flattened parameter. Megatron-Core 0.19.2 has no way to
store it that both changes tensor, expert or pipeline parallelism on resume and stays small: `fully_reshardable` gathers
the states of all data-parallel ranks in the host memory of every one (of the first with
`distrib_optim_fully_reshardable_mem_efficient`), for a save and for a load; `fully_sharded_model_space` needs
`ShardedTensor.flattened_range`, which raises; `dp_reshardable` keeps buckets, so only data parallelism may change.

Here the range is cut into boxes of the parameter (`flat_boxes`). They have the names and the whole shapes of
`fully_reshardable`, so either reads the other's checkpoints: a chunk of a checkpoint says where it lies. A box is a
view of the optimizer's own tensor; nothing is exchanged, and nothing is copied but what the writer takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_anyexperts.platform.flat_boxes import boxes_of_range


@dataclass(frozen=True)
class Owned:
    """A rank's range of one parameter.

    Attributes:
        parameter: of the model.
        states: [range] master weight ("param") and moments, by name.
        boxes: views of them, by the name of their place in the checkpoint.
    """

    parameter: torch.nn.Parameter
    states: dict[str, torch.Tensor]
    boxes: dict[str, torch.Tensor]


def stored_parts(stored: ShardedTensor | ShardedTensorFactory, replica_id: tuple[int, ...]) -> list[ShardedTensor]:
    """The tensors of a checkpoint that a parameter consists of, each with a view of a meta tensor of its shape.

    Args:
        stored: how the model stores the parameter; a factory splits it, as it does gate and up projection.
        replica_id: of the parts.

    Raises:
        ValueError: the parts are not views, so the place of an element in the parameter is unknown.
    """
    whole = torch.empty(stored.data.shape, device="meta")
    if isinstance(stored, ShardedTensor):
        return [replace(stored, data=whole, dtype=whole.dtype, replica_id=replica_id)]
    parts = list(nested_values(stored.build_fn(stored.key, whole, replica_id, None)))
    if any(part.data._base is not whole for part in parts) or sum(part.data.numel() for part in parts) != whole.numel():
        raise ValueError(f"{stored.key} is stored in parts that are no views of it; its optimizer state cannot be")
    return parts


def _boxes(name: str, state_N: torch.Tensor, start: int, parts: list[ShardedTensor]) -> Iterator[ShardedTensor]:
    """What a checkpoint holds of elements `start` to `start + N` of a parameter's flat state."""
    stop = start + state_N.numel()
    for part in parts:
        view, added = part.data, part.prepend_axis_num
        for box in boxes_of_range(view.shape, view.stride(), view.storage_offset(), start, stop):
            shape, strides = (1,) * added + box.lengths, (1,) * added + view.stride()
            offsets = zip(part.global_offset, (0,) * added + box.offsets, strict=True)
            yield replace(
                part,
                key=f"optimizer.state.{name}.{part.key}",
                data=state_N.as_strided(shape, strides, state_N.storage_offset() + box.first - start),
                dtype=state_N.dtype,
                local_shape=shape,
                global_offset=tuple(whole + within for whole, within in offsets),
                axis_fragmentations=None,  # boxes are no regular grid
                prepend_axis_num=0,
            )


def sharded_states(
    optimizer: DistributedOptimizer, model_sharded_state_dict: dict, is_loading: bool
) -> dict[int, dict[str, Any]]:
    """The optimizer's states of this rank's ranges, as boxes of whole tensors.

    Args:
        optimizer: its states must exist.
        model_sharded_state_dict: how the model's parameters are stored.
        is_loading: keep what `load_sharded_states` needs, which is not stored.

    Raises:
        ValueError: states have another size than the range they are of.
    """
    sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    stored_by_parameter = {each.data: each for each in nested_values(sharded)}
    result = {}
    owned = (
        (parameter, ranges["param"])
        for buffer in optimizer.gbuf_ranges
        for buckets in buffer.values()
        for bucket in buckets
        for parameter, ranges in bucket["param_map"].items()
    )
    for index, (parameter, range_) in enumerate(owned):
        stored = stored_by_parameter[parameter]
        # The ranges of data-parallel ranks are parts, not copies, so the last coordinate counts optimizers.
        replica_id = (*stored.replica_id[:2], optimizer.distributed_optimizer_instance_id)
        parts = stored_parts(stored, replica_id)
        states = {
            name: state.detach()
            for name, state in optimizer._get_main_param_and_optimizer_states(parameter).items()
            if name != "step"  # one for all parameters, stored beside them
        }
        if any(len(state) != len(range_) for state in states.values()):
            raise ValueError(
                f"{stored.key}: states of {[len(state) for state in states.values()]} elements for a range of "
                f"{len(range_)}: they belong to another parameter"
            )
        boxes = {
            f"{name}.{number}": box
            for name, state in states.items()
            for number, box in enumerate(_boxes(name, state, range_.start, parts))
        }
        result[index] = {"boxes": boxes}
        if is_loading:
            views = {name: box.data for name, box in boxes.items()}
            result[index]["owned"] = LocalNonpersistentObject(Owned(parameter, states, views))
    return result


@torch.no_grad()
def load_sharded_states(optimizer: DistributedOptimizer, loaded: dict[int, dict[str, Any]]) -> None:
    """Put states that were read into the boxes of `sharded_states` into the optimizer.

    Args:
        optimizer: the one that the boxes were made of.
        loaded: what `sharded_states` returned, with the tensors of the checkpoint in place of its sharded tensors.
    """
    for each in loaded.values():
        owned = each["owned"]
        for name, view in owned.boxes.items():
            view.copy_(each["boxes"][name])
        # A no-op but for optimizers that keep their states scaled, and give out copies.
        optimizer._set_main_param_and_optimizer_states(owned.parameter, owned.states)
    if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
        optimizer.optimizer._sync_hdo_state_to_sub_optimizers()
