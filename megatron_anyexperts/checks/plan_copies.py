"""When copies of hot experts pay (`--anyexperts-balance copies`), by link: `moe/copy_price.py` for a planned layout."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_anyexperts.checks.plan_layout import Layout
from megatron_anyexperts.checks.plan_time import Setting
from megatron_anyexperts.moe.copy_price import price


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
    sizes, mixture = setting.sizes, setting.sizes.mixture
    read = mixture.latent or sizes.hidden
    costs = {}
    for link in ("NVLink", "network"):
        one = price(
            sizes.matrices * read * mixture.ffn,
            read,
            setting.precision.fp8,
            setting.gpu,
            link == "NVLink",
            setting.reached,
        )
        costs[link] = CopyCost(one.seconds, one.slots, 1 + one.slots / (layout.tokens * mixture.real))
    return costs
