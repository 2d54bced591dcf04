"""When a copy of a hot expert pays for its way (`moe/expert_copies.py`), from bytes and operations.

A copy sends an expert's weights forward and again backward, and takes an fp32 gradient home: four times its bf16 size.
A slot that moves off the fullest rank saves three products of the forward pass's size there, and its way through the
exchange.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_anyexperts.hardware import ASSUMED, GPUS_PER_NODE, Efficiency, Gpu, gpu_named

if TYPE_CHECKING:
    from megatron_anyexperts.moe.config import AnyExpertsConfig


@dataclass(frozen=True)
class Price:
    """Of one copy over one link.

    Attributes:
        seconds: on the link of its owner.
        slots: fewest that it must carry to pay.
    """

    seconds: float
    slots: int


def price(weights: int, read: int, fp8: bool, gpu: Gpu, within_node: bool, reached: Efficiency = ASSUMED) -> Price:
    """Of a copy that stays on a node, or leaves it.

    Args:
        weights: elements of an expert.
        read: elements of a token that travel to it.
        fp8: whether experts multiply in FP8.
        gpu: what is paid for, and the link.
        within_node: over NVLink, not over the network.
        reached: parts of the peaks.
    """
    bandwidth = gpu.nvlink * reached.nvlink if within_node else gpu.network * reached.network
    peak = gpu.fp8 * reached.fp8 if fp8 else gpu.bf16 * reached.bf16
    seconds = 4 * 2.0 * weights / bandwidth
    # There and back, forward and backward.
    saved = 3 * 2.0 * weights / (peak * reached.grouped) + 4 * 2.0 * read / bandwidth
    return Price(seconds, math.ceil(seconds / saved))


@dataclass(frozen=True)
class Balance:
    """What `anyexperts_balance` comes to on this machine.

    Attributes:
        copies: whether hot experts are copied.
        least: fewest slots that a copy is made for.
        why: for the log; empty where the setting says it itself.
    """

    copies: bool
    least: int
    why: str = ""


def settle(config: AnyExpertsConfig, ep_group: torch.distributed.ProcessGroup) -> Balance:
    """What the setting comes to for an expert-parallel group; the same on all its ranks if their GPUs are of a kind."""
    ranks = torch.distributed.get_process_group_ranks(ep_group) if ep_group.size() > 1 else [0]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", GPUS_PER_NODE))
    return settle_on(config, device, len(ranks), len({rank // per_node for rank in ranks}))


def settle_on(config: AnyExpertsConfig, device: str, ranks: int, nodes: int) -> Balance:
    """As `settle`, of plain facts.

    Args:
        device: what the driver calls the GPU.
        ranks, nodes: how many an expert-parallel group spans.
    """
    least = config.anyexperts_copies_min_slots
    if ranks == 1 or config.anyexperts_balance == "reroute":
        return Balance(False, least)
    if config.anyexperts_balance == "copies":
        return Balance(True, least)
    for option, reason in config.against_copies().items():
        return Balance(False, least, f"no copies of hot experts, {option} does not combine with them: {reason}")
    if (gpu := gpu_named(device)) is None:
        return Balance(
            False,
            least,
            f"no copies of hot experts, what they cost on {device} is not known; to have them, use "
            "--anyexperts-balance copies and --anyexperts-copies-min-slots",
        )
    one = price(*expert_size(config), bool(config.fp8), gpu, nodes == 1)
    least = max(least, one.slots)
    return Balance(
        True,
        least,
        f"copies of hot experts, each for {least} slots or more: one takes {1e6 * one.seconds:.0f} us "
        f"{'over NVLink' if nodes == 1 else 'over the network'} by the cost model ({device})",
    )


def expert_size(config: AnyExpertsConfig) -> tuple[int, int]:
    """Weights of an expert, and elements of a token that it reads."""
    read = config.moe_latent_size or config.hidden_size
    ffn = config.moe_ffn_hidden_size or config.ffn_hidden_size
    return (3 if config.gated_linear_unit else 2) * read * ffn, read
