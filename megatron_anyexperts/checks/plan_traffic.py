"""Bytes that a GPU sends in a step over NVLink and over the network, by what is exchanged."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_anyexperts.checks.plan_layout import Layout
from megatron_anyexperts.checks.plan_memory import Precision
from megatron_anyexperts.checks.plan_parameters import Stage, stage_parameters
from megatron_anyexperts.checks.plan_sizes import ModelSizes
from megatron_anyexperts.hardware import GPUS_PER_NODE, Efficiency, Gpu


@dataclass(frozen=True)
class Sent:
    """Bytes of one GPU, one way."""

    nvlink: float = 0.0
    network: float = 0.0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.nvlink + other.nvlink, self.network + other.network)

    def times(self, factor: float) -> Sent:
        """As often."""
        return Sent(self.nvlink * factor, self.network * factor)

    def seconds(self, gpu: Gpu, reached: Efficiency) -> float:
        """Both links at once: the slower decides."""
        return max(self.nvlink / (gpu.nvlink * reached.nvlink), self.network / (gpu.network * reached.network))


def distinct(slots: float, places: int, reach: float) -> float:
    """Expected number of different places that hold `slots` experts of a token, drawn evenly from a share of them."""
    within = max(1.0, places * reach)
    return within * (1 - (1 - 1 / within) ** slots)


def expert_exchange(sizes: ModelSizes, layout: Layout, once: bool = False) -> Sent:
    """Of one way of one exchange of a mixture layer and microbatch: slots to experts, or back.

    Args:
        once: a token goes once to each node and once to each rank, as in DeepEP and HybridEP, and not once a slot.
    """
    group, mixture = layout.expert, sizes.mixture
    inside = layout.members(group, layout.expert_tensor)
    bytes_a_slot = 2.0 * (mixture.latent or sizes.hidden) * layout.tokens
    if once:
        nodes = group // inside
        copies = [distinct(mixture.real, places, mixture.reach) * (places - 1) / places for places in (group, nodes)]
        return Sent(*copies).times(bytes_a_slot)
    slots = Sent((inside - 1) / group, (group - inside) / group).times(mixture.real * bytes_a_slot)
    # Ranks that share experts gather each other's slots.
    return slots + Sent((layout.expert_tensor - 1) * mixture.real * bytes_a_slot)


def tensor_exchange(sizes: ModelSizes, layout: Layout, letter: str) -> Sent:
    """Of one layer and microbatch, forward and backward, with sequence parallelism.

    Two gathers and two scatters of the activations, and a gather for the gradient of weights.
    """
    if letter == "E" and not sizes.mixture.shared:
        return Sent()
    return Sent(5 * 2.0 * sizes.hidden * layout.tokens * (layout.tensor - 1))


def pipeline_exchange(sizes: ModelSizes, layout: Layout) -> Sent:
    """Of one chunk and microbatch: activations to the next stage, gradients to the one before."""
    if layout.pipeline == 1:
        return Sent()
    both = 2 * 2.0 * sizes.hidden * layout.tokens
    return Sent(both) if 2 * layout.gpus // layout.pipeline <= GPUS_PER_NODE else Sent(0.0, both)


def data_exchange(sizes: ModelSizes, layout: Layout, precision: Precision, stage: Stage) -> Sent:
    """Of a step: gradients are reduced and scattered, parameters gathered; without a distributed optimizer only the
    gradients, scattered and gathered. Rings through a node share its links out of it."""
    experts = layout.expert * layout.expert_tensor
    sent = Sent()
    for each in stage_parameters(sizes, stage):
        expert = each.spread == "expert"
        ranks, stride = (layout.expert_data, experts) if expert else (layout.data, layout.tensor)
        inside = layout.members(ranks, stride)
        back = precision.parameter if precision.distributed else precision.gradient
        size = each.local(layout.tensor, experts) * (precision.gradient + back) * (ranks - 1) / ranks
        sent += Sent(size if inside > 1 else 0.0, size / inside if ranks > inside else 0.0)
    return sent
