"""How fast the slot controller reaches its target, and how well it holds it while importance drifts.

    python benchmarks/controller.py

Importance of a step is drawn per token from a mixture of modalities whose means, spread and shares change as the
scenario says. Every step routes one batch, counts its slots and moves the offset, as training does. Peers: no
controller (the offset stays 0), and a sign rule with a fixed step, as the aux-loss-free expert bias moves.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_anyexperts.moe.controllers import next_offset
from megatron_anyexperts.moe.slots import integer_slots, soft_slots

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Scenario = Callable[[int, int, torch.Generator], Tensor]


def _mixture(means: list[float], shares: list[float], spread: float, tokens: int, generator: torch.Generator) -> Tensor:
    """Importance of tokens of several modalities: logistic of a normal variable around each one's mean logit."""
    kinds = torch.multinomial(torch.tensor(shares), tokens, replacement=True, generator=generator)
    logits = torch.tensor(means)[kinds] + spread * torch.randn(tokens, generator=generator)
    return torch.sigmoid(logits)


def steady(step: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Text, image and audio with fixed importance."""
    return _mixture([0.8, -0.8, -0.3], [0.4, 0.4, 0.2], 0.5, tokens, generator)


def ramp(step: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Importance rises by 2 logits over 400 steps, as in early training."""
    return _mixture([-1 + 2 * min(step / 400, 1)], [1.0], 0.5, tokens, generator)


def wave(step: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Importance swings by +-1 logit with a period of 100 steps."""
    return _mixture([math.sin(2 * math.pi * step / 100)], [1.0], 0.5, tokens, generator)


def collapse(step: int, tokens: int, generator: torch.Generator) -> Tensor:
    """The spread shrinks to a hundredth: nearly all tokens cross a slot boundary together."""
    return _mixture([0.0], [1.0], 0.5 * 0.01 ** min(step / 300, 1), tokens, generator)


def jump(step: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Every 150 steps the mixture flips from mostly text to mostly images."""
    shares = [0.9, 0.1] if step // 150 % 2 == 0 else [0.1, 0.9]
    return _mixture([1.0, -1.0], shares, 0.5, tokens, generator)


def simulate(
    scenario: Scenario, rule: Rule, gradient: str, k_min: int, k_max: int, tokens: int, steps: int, seed: int
) -> list[float]:
    """Return the mean slots of every step."""
    generator = torch.Generator().manual_seed(seed)
    offset, means = torch.zeros(1), []
    for step in range(steps):
        soft_T = soft_slots(scenario(step, tokens, generator), offset, k_min, k_max)
        slots_T = integer_slots(soft_T, gradient)
        movable = ((soft_T > k_min) & (soft_T < k_max)).sum()
        counts = (torch.tensor([float(tokens)]), slots_T.sum().view(1).double(), movable.view(1).double())
        offset = rule(offset, *counts)
        means.append(slots_T.double().mean().item())
    return means


def settle(means: list[float], target: float, band: float = 0.01, hold: int = 10) -> int | None:
    """Return the first step from which `hold` steps in a row stay within `band` of the target; None: never."""
    inside = [abs(mean / target - 1) <= band for mean in means]
    return next((step for step in range(len(means) - hold + 1) if all(inside[step : step + hold])), None)


def main() -> None:
    """Parse and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--k-min", type=int, default=8, help="fewest slots")
    parser.add_argument("--k-max", type=int, default=12, help="most slots")
    parser.add_argument("--target", type=float, default=9.0, help="target mean slots")
    parser.add_argument("--rate", type=float, default=0.5, help="--anyexperts-slot-rate")
    parser.add_argument("--sign-step", type=float, default=0.001, help="step of the sign rule")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per step")
    parser.add_argument("--steps", type=int, default=600, help="steps")
    parser.add_argument("--gradient", choices=["fractional", "straight_through"], default="fractional")
    args = parser.parse_args()
    torch.set_num_threads(1)
    span = args.k_max - args.k_min

    def controller(offset, tokens, slots, movable):
        return next_offset(offset, tokens, slots, movable, args.target, span, args.rate)

    def sign(offset, tokens, slots, movable):
        return (offset + args.sign_step * torch.sign(args.target - slots / tokens)).float()

    rules: dict[str, Rule] = {"none": lambda offset, *_: offset, "sign": sign, "ours": controller}
    print(
        f"k {args.k_min}..{args.k_max}, target {args.target} slots, {args.tokens} tokens a step, {args.steps} steps, "
        f"{args.gradient} gates\nsettled: first step from which 10 in a row are within 1 %; worst and mean deviation "
        "after our controller settled"
    )
    print(f"{'scenario':10}{'controller':>12}{'settled':>9}{'worst':>9}{'mean':>9}")
    for scenario in (steady, ramp, wave, collapse, jump):
        runs = {
            name: simulate(scenario, rule, args.gradient, args.k_min, args.k_max, args.tokens, args.steps, seed=1)
            for name, rule in rules.items()
        }
        start = settle(runs["ours"], args.target) or 0
        for name, means in runs.items():
            deviations = [abs(mean / args.target - 1) for mean in means[start:]]
            step = settle(means, args.target)
            print(
                f"{scenario.__name__:10}{name:>12}{'never' if step is None else step:>9}"
                f"{max(deviations):9.2%}{sum(deviations) / len(deviations):9.2%}"
            )


if __name__ == "__main__":
    main()
