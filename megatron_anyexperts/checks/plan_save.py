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
    """One checkpoint: bytes of it all, and of the fullest host's memory; seconds that training waits.

    `gathered` is optimizer state that `fully_reshardable` brings together on the first data-parallel rank of each
    shard; `peak` counts the padded copy that it makes of it.
    """

    stored: float
    gathered: float
    peak: float
    stall: float


def save(sizes: ModelSizes, layout: Layout, precision: Precision, write: float) -> Save:
    """Of a layout.

    Args:
        write: bytes a second that the file system takes from all nodes together.
    """
    stored = gathered = 0.0
    for stage in stages(sizes, layout.pipeline):
        dense = expert = 0.0
        for each in stage_parameters(sizes, stage):
            # The embedding is stored once, though the last stage may hold it too.
            if each.part == "embedding" and not stage.first:
                continue
            stored += each.number * (precision.optimizer + (4 if each.wide else precision.parameter))
            state = precision.optimizer * each.local(layout.tensor, layout.expert * layout.expert_tensor)
            dense, expert = (dense, expert + state) if each.spread == "expert" else (dense + state, expert)
        # The first ranks of the groups are the first GPUs of a stage: their nodes hold these of every shard.
        shards = min(GPUS_PER_NODE, layout.tensor), min(GPUS_PER_NODE, layout.expert * layout.expert_tensor)
        gathered = max(gathered, dense * shards[0] + expert * shards[1])
    return Save(stored, gathered, 2 * gathered, stored / write)
