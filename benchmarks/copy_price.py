"""How many slots a copy of an expert must compute until it pays: weights on the wire against products saved.

    python benchmarks/copy_price.py

A model and no measurement. A copy's weights travel twice in bf16, its gradients once, over the owner's link; a slot
that it computes saves the owner six FLOP a weight, forward and backward. The size of the expert cancels out. What else
a copy saves (the slots' way to the owner) and what overlap hides would lower the number; copies of one owner share its
link.
"""

import argparse

# Peak of dense bf16 products, FLOP/s, and bytes/s of one direction: NVIDIA's data sheets of H100 SXM, H200 and B200,
# NVLink 4 and 5; a 400 Gbit/s network port per GPU.
PEAK = {"H100": 989e12, "H200": 989e12, "B200": 2250e12}
LINKS = {"NVLink": {"H100": 450e9, "H200": 450e9, "B200": 900e9}, "400 Gbit/s": dict.fromkeys(PEAK, 50e9)}


def break_even(flops: float, rate: float, gradient_bytes: int = 4, copies: int = 1) -> float:
    """Slots that one copy must compute.

    Args:
        flops: FLOP/s that grouped products reach.
        rate: bytes/s that the owner's link reaches.
        gradient_bytes: of one weight's gradient, 4 with fused accumulation, else 2.
        copies: of this owner in the same step.
    """
    return copies * (2 + 2 + gradient_bytes) / rate * flops / 6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--efficiency", type=float, default=0.4, help="of grouped products, of the peak")
    parser.add_argument("--link-efficiency", type=float, default=0.8, help="of an all-to-all, of the link's rate")
    parser.add_argument("--copies", type=int, nargs="*", default=[1, 4], help="copies of the same owner in a step")
    args = parser.parse_args()
    print("| GPU | link | " + " | ".join(f"slots a copy, {n} of an owner" for n in args.copies) + " |")
    print("| --- | --- |" + " --- |" * len(args.copies))
    for link, rates in LINKS.items():
        for gpu, peak in PEAK.items():
            rate, flops = rates[gpu] * args.link_efficiency, peak * args.efficiency
            cells = [f"{break_even(flops, rate, copies=n):,.0f}" for n in args.copies]
            print(f"| {gpu} | {link} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
