"""Pretraining that also writes the live weights, fp32 masters and Adam moments, before it saves and after it loads.

Each rank writes, for every tensor and state, the part it holds with its place in the whole tensor, so that a test can
compare states across layouts without going through the checkpoint format.
"""

import sys
from pathlib import Path

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


def dump(model, optimizer, path: Path) -> None:
    """Write [(key, offset in the whole tensor, whole shape, local shape, start, end, values)] for each state."""
    records = []
    chunks = unwrap_model(model)
    by_parameter: dict = {}
    for chunk in chunks:
        for entry in nested_values(chunk.sharded_state_dict()):
            if isinstance(entry, ShardedTensor | ShardedTensorFactory) and isinstance(entry.data, torch.Tensor):
                by_parameter[entry.data] = entry
    parts = {}
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        parts.update(whole_states(each))
    for data, entry in by_parameter.items():
        place = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        first = next(iter(nested_values(place))) if not isinstance(place, ShardedTensor) else place
        # Factories split fused matrices; the first part's place identifies the local tensor among the layouts' shards.
        identity = (entry.key, tuple(first.global_offset), tuple(data.shape))
        records.append((identity, "weight", 0, data.numel(), data.detach().float().flatten().clone()))
        for name, (start, end, values) in parts.get(data, {}).items():
            if name == "step":
                records.append((identity, name, 0, 1, values.reshape(1)))
            else:
                records.append((identity, name, start, end, values.float()))
    path.mkdir(parents=True, exist_ok=True)
    torch.save(records, path / f"rank{torch.distributed.get_rank()}.pt")


def live_state(folder: Path) -> dict[tuple, torch.Tensor]:
    """Join what the ranks hold of each tensor; replicas must agree."""
    pieces: dict[tuple, dict[tuple[int, int], torch.Tensor]] = {}
    for file in folder.glob("rank*.pt"):
        for identity, name, start, end, values in torch.load(file):
            seen = pieces.setdefault((*identity, name), {})
            if (start, end) in seen:
                assert torch.equal(seen[start, end], values), (identity, name)
            seen[start, end] = values
    return {
        key: torch.cat([values for (start, end), values in sorted(parts.items()) if end > start])
        for key, parts in pieces.items()
    }


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
