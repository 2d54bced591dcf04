"""A layout of a job over its GPUs, and why it cannot be had."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_anyexperts.checks.plan_parameters import stages
from megatron_anyexperts.checks.plan_sizes import ModelSizes
from megatron_anyexperts.hardware import GPUS_PER_NODE


@dataclass(frozen=True)
class Layout:
    """How a job is spread over GPUs, and what it recomputes.

    Attributes:
        gpus, tensor, pipeline, expert, expert_tensor: sizes of the job and of its parallel groups.
        micro_batch, global_batch, sequence: rows of a microbatch and of a step, positions of a row.
        recompute: Megatron's modules, or {"full"}.
    """

    gpus: int
    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int
    micro_batch: int
    global_batch: int
    sequence: int
    recompute: frozenset[str] = frozenset()

    @property
    def data(self) -> int:
        """Data-parallel ranks of what is no expert."""
        return self.gpus // (self.tensor * self.pipeline)

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return self.gpus // (self.expert * self.expert_tensor * self.pipeline)

    @property
    def microbatches(self) -> int:
        """Of a step, on one rank."""
        return self.global_batch // (self.micro_batch * self.data)

    @property
    def tokens(self) -> float:
        """Positions of a microbatch on one rank of a tensor-parallel group that splits the sequence."""
        return self.micro_batch * self.sequence / self.tensor

    def members(self, size: int, stride: int) -> int:
        """GPUs in one node of a group of `size` ranks, each `stride` ranks from the next."""
        return max(1, min(size, GPUS_PER_NODE // stride))

    def __str__(self) -> str:
        extent = f"TP{self.tensor} PP{self.pipeline} EP{self.expert} DP{self.data}"
        return f"{extent}, micro batch {self.micro_batch}, recompute {', '.join(sorted(self.recompute)) or 'nothing'}"


def refusal(sizes: ModelSizes, layout: Layout) -> str | None:
    """Why a model cannot be laid out so; None if it can."""
    model = layout.tensor * layout.pipeline
    experts = layout.expert * layout.expert_tensor * layout.pipeline
    if layout.gpus % model:
        return f"TP x PP = {model} does not divide {layout.gpus} GPUs"
    if sizes.mixture and layout.gpus % experts:
        return f"EP x ETP x PP = {experts} does not divide {layout.gpus} GPUs"
    if sizes.mixture and sizes.mixture.experts % layout.expert:
        return f"EP{layout.expert} does not divide {sizes.mixture.experts} experts"
    heads = [("heads", sizes.heads), ("groups of heads", sizes.groups)]
    heads += [(f"heads of the {name} encoder", getattr(sizes, name).heads) for name in ("vision", "audio")
              if getattr(sizes, name)]  # fmt: skip
    for what, number in heads:
        if number % layout.tensor:
            return f"TP{layout.tensor} does not divide {number} {what}"
    if layout.sequence % layout.tensor:
        return f"TP{layout.tensor} does not divide {layout.sequence} positions"
    if stages(sizes, layout.pipeline) is None:
        return f"PP{layout.pipeline} does not divide the layers of {sizes.pattern}"
    if layout.global_batch % (layout.micro_batch * layout.data):
        return f"micro batch x DP = {layout.micro_batch * layout.data} does not divide {layout.global_batch} rows"
    return None
