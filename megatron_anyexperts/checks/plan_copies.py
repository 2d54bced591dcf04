"""When copies of hot experts pay (`--anyexperts-balance copies`), by link, from bytes and operations.

A copy sends an expert's weights forward and again backward, and takes an fp32 gradient home: four times its bf16 size.
A slot that moves off the fullest rank saves three forward products there, and its place in the exchange.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_anyexperts.checks.plan_layout import Layout
from megatron_anyexperts.checks.plan_time import Setting


@dataclass(frozen=True)
class CopyCost:
    """Of one copy over one link.

    Attributes:
        seconds: on the link of its owner.
        slots: fewest that it must carry to pay, `--anyexperts-copies-min-slots`.
        imbalance: fullest rank over the mean from which the first copy pays.
    """

    seconds: float
    slots: int
    imbalance: float


def copy_costs(setting: Setting, layout: Layout) -> dict[str, CopyCost]:
    """Of a copy that stays on a node, and of one that leaves it."""
    sizes, gpu, reached = setting.sizes, setting.gpu, setting.reached
    mixture = sizes.mixture
    read = mixture.latent or sizes.hidden
    weights = sizes.matrices * read * mixture.ffn
    peak = gpu.fp8 * reached.fp8 if setting.precision.fp8 else gpu.bf16 * reached.bf16
    links = {"NVLink": gpu.nvlink * reached.nvlink, "network": gpu.network * reached.network}
    costs = {}
    for name, bandwidth in links.items():
        seconds = 4 * 2.0 * weights / bandwidth
        # There and back, forward and backward.
        saved = 3 * 2.0 * weights / (peak * reached.grouped) + 4 * 2.0 * read / bandwidth
        slots = math.ceil(seconds / saved)
        costs[name] = CopyCost(seconds, slots, 1 + slots / (layout.tokens * mixture.real))
    return costs
