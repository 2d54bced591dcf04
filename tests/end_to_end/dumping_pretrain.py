"""Pretraining that also writes the live weights, fp32 masters and Adam moments, before it saves and after it loads.

Each rank writes, for every tensor and state, the part it holds with its place in the whole tensor, so that a test can
compare states across layouts without going through the checkpoint format.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import unwrap_model

from megatron_anyexperts.training import checkpoints, pretrain


def whole_states(optimizer: DistributedOptimizer) -> dict[torch.nn.Parameter, dict[str, torch.Tensor]]:
    """Full local tensors of each parameter's fp32 master and moments, gathered over the data-parallel ranks."""
    result = {}
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, places in bucket["param_map"].items():
                    states = optimizer._get_main_param_and_optimizer_states(parameter)
                    result[parameter] = {
                        name: (places["param"].start, places["param"].end, states[name].detach().clone())
                        for name in ("param", "exp_avg", "exp_avg_sq", "step")
                        if name in states
                    }
    return result


class Part(NamedTuple):
    """Where a part of a parameter lies: in the whole tensor `key` of shape `size`, and in the flat parameter."""

    key: str
    size: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int


def parts_of(entry: ShardedTensor | ShardedTensorFactory) -> tuple[Part, ...]:
    """Of a parameter as the model stores it; a factory splits fused matrices."""
    built = list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]
    start = entry.data.storage_offset()
    return tuple(
        Part(
            part.key,
            tuple(part.global_shape),
            tuple(part.global_offset),
            tuple(part.data.shape),
            part.data.stride(),
            part.data.storage_offset() - start,
        )
        for part in built
    )


def dump(model, optimizer, path: Path) -> None:
    """Write [(parts, state, start, end, values)] for each parameter and state."""
    records = []
    by_parameter: dict = {}
    for chunk in unwrap_model(model):
        for entry in nested_values(chunk.sharded_state_dict()):
            if isinstance(entry, ShardedTensor | ShardedTensorFactory) and isinstance(entry.data, torch.Tensor):
                by_parameter[entry.data] = entry
    states = {}
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        states.update(whole_states(each))
    for data, entry in by_parameter.items():
        parts = parts_of(entry)
        records.append((parts, "weight", 0, data.numel(), data.detach().float().flatten().clone()))
        for name, (start, end, values) in states.get(data, {}).items():
            if name == "step":
                records.append((parts, name, 0, 1, values.reshape(1)))
            else:
                records.append((parts, name, start, end, values.float()))
    path.mkdir(parents=True, exist_ok=True)
    plain = [(tuple(map(tuple, parts)), *rest) for parts, *rest in records]
    torch.save(plain, path / f"rank{torch.distributed.get_rank()}.pt")


def live_state(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Whole tensors by key and state, of what the ranks hold of each; replicas must agree."""
    pieces: dict[tuple, dict[tuple[int, int], torch.Tensor]] = {}
    for file in folder.glob("rank*.pt"):
        for parts, name, start, end, values in torch.load(file):
            seen = pieces.setdefault((parts, name), {})
            if (start, end) in seen:
                assert torch.equal(seen[start, end], values), (parts, name)
            seen[start, end] = values
    whole: dict[tuple[str, str], torch.Tensor] = {}
    for (parts, name), held in pieces.items():
        flat = torch.cat([values for (start, end), values in sorted(held.items()) if end > start])
        for part in map(Part._make, parts):
            if name == "step":
                assert torch.equal(whole.setdefault((part.key, name), flat), flat), part.key
                continue
            tensor = whole.setdefault((part.key, name), torch.full(part.size, torch.nan))
            shape = (1,) * (len(part.size) - len(part.shape)) + part.shape
            box = tensor[tuple(slice(begin, begin + size) for begin, size in zip(part.offset, shape, strict=True))]
            values = flat.as_strided(part.shape, part.strides, part.first).reshape(shape)
            known = ~box.isnan()
            assert torch.equal(box[known], values[known]), (part.key, name)
            box.copy_(values)
    assert [key for key, tensor in whole.items() if tensor.isnan().any()] == []
    return whole


class DumpingCheckpoints(checkpoints.Checkpoints):
    """Writes the live state into RUN/live_saved/ITERATION and RUN/live_loaded."""

    def save(self, iteration, model, optimizer, *arguments, **keywords):
        dump(model, optimizer, self.run.root / f"live_saved/{iteration}")
        super().save(iteration, model, optimizer, *arguments, **keywords)

    def load(self, model, optimizer, *arguments, **keywords):
        result = super().load(model, optimizer, *arguments, **keywords)
        if result[0]:
            dump(model, optimizer, self.run.root / "live_loaded")
        return result


if __name__ == "__main__":
    checkpoints.Checkpoints = DumpingCheckpoints
    sys.exit(pretrain.main())
