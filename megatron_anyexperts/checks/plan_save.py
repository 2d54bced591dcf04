"""Size of a checkpoint, how long it takes, and what host memory a save needs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_anyexperts.checks.plan_layout import Layout
from megatron_anyexperts.checks.plan_memory import Precision
from megatron_anyexperts.checks.plan_parameters import stage_parameters, stages
from megatron_anyexperts.checks.plan_sizes import ModelSizes
from megatron_anyexperts.hardware import GPUS_PER_NODE


@dataclass(frozen=True)
class Save:
    """One checkpoint: bytes of it all, of what the busiest rank writes, and of hosts' memory; seconds of waiting.

    `host` is what the ranks of a node copy from their GPUs, `host_most` what torch may take for it: it rounds blocks of
    pinned memory up to powers of two.
    """

    stored: float
    shard: float
    host: float
    host_most: float
    stall: float


def save(sizes: ModelSizes, layout: Layout, precision: Precision, write: float) -> Save:
    """Of a layout.

    Args:
        write: bytes a second that the file system takes from all nodes together.
    """
    stored = most = 0.0
    for stage in stages(sizes, layout.pipeline):
        shard = 0.0
        for each in stage_parameters(sizes, stage):
            # The embedding is stored once, though the last stage may hold it too.
            if each.part == "embedding" and not stage.first:
                continue
            size = precision.optimizer + (4 if each.wide else precision.parameter)
            stored += each.number * size
            # Copies of weights are shared out among those that hold them; states have one owner anyway.
            ranks = layout.expert_data if each.spread == "expert" else layout.data
            shard += size * each.local(layout.tensor, layout.expert * layout.expert_tensor) / ranks
        most = max(most, shard)
    host = most * min(GPUS_PER_NODE, layout.gpus)
    return Save(stored, most, host, 2 * host, stored / write)
