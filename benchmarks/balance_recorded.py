"""Load of expert ranks under the decisions of a trained router, whose tokens are correlated as real documents are.

    python benchmarks/balance_recorded.py --run-dir runs/demo/pretrain --ep 2 4 8

Every source is one held-out microbatch of the run: whole documents, not a mixture of all. Methods and columns are those
of `dispatch_balance.py`; a bias is not among them, as the run was trained with its own. That bias chooses and does not
weigh, so a rerouted slot may have a larger gate than before: `gates` is the gate mass routed, and that received under
the cap, over the most that any assignment under the cap receives (a bound). `kept` is of the mean step: with R copies a
rank in the places that all steps before would have had (`--anyexperts-copies-refresh`), and without copies.
"""

from collections import defaultdict
from itertools import accumulate

import numpy as np
import torch
from balance_copies import COPIES_PER_RANK
from balance_workloads import most_gate_mass

from megatron_anyexperts.console import Parser
from megatron_anyexperts.evaluation.held_out import forward, held_out_batches
from megatron_anyexperts.evaluation.trained_model import load_model, start
from megatron_anyexperts.moe.cap import fit_sources
from megatron_anyexperts.moe.copies import CopyPlan, places_of, plan_copies, plan_on
from megatron_anyexperts.moe.decision import RoutingDecision
from megatron_anyexperts.moe.quotas import slot_cap
from megatron_anyexperts.moe.reroute import FittedSlots
from megatron_anyexperts.moe.router import AnyExpertsRouter

COLUMNS = (
    "EP",
    "layer",
    "dropless",
    "**cap**",
    "rerouted",
    "virtual",
    "gates",
    "**copies**",
    "R",
    "slots moved",
    "kept",
)


def record(words: list[str], microbatches: int) -> dict[int, list[RoutingDecision]]:
    """What the routers decide, by layer and microbatch, with the fallbacks that a cap needs."""
    args = start(words)
    model, found = load_model(args), defaultdict(list)
    for module in model.modules():
        if isinstance(module, AnyExpertsRouter):
            module.needs_fallback = True
            module.register_forward_hook(lambda router, _, decision: found[router.layer_number].append(decision))
    for batch in held_out_batches(args, microbatches):
        forward(model, batch)
    return dict(sorted(found.items()))


def capped(decisions: list[RoutingDecision], ranks: int, eps: float, k_max: int) -> tuple[list[FittedSlots], float]:
    """What the cap makes of one step, and the most gate mass that any assignment under it receives."""
    gates_NE = torch.cat([each.gates_TE + each.fallback_gates_TE for each in decisions])
    slots_N = torch.cat([each.routing_map_TE.sum(1) for each in decisions])
    most = most_gate_mass(gates_NE, slots_N, slot_cap(slots_N.sum(), ranks, eps).item(), torch.zeros(ranks))
    return fit_sources(decisions, ranks, k_max, eps).fitted, most


def copied(counts: list[np.ndarray], ranks: int, eps: float) -> tuple[int, list[CopyPlan]]:
    """Fewest copies a rank that keep every step within 1 + eps, or the most tried, and the plans."""
    for per_rank in COPIES_PER_RANK:
        plans = [plan_copies(counts_SE, ranks, per_rank, eps) for counts_SE in counts]
        if all(plan.cap <= slot_cap(int(each.sum()), ranks, eps) for plan, each in zip(plans, counts, strict=True)):
            break
    return per_rank if any(plan.copies for plan in plans) else 0, plans


def over_mean(load_P: np.ndarray) -> float:
    return load_P.max() / load_P.mean()


def row(decisions: list[RoutingDecision], layer: int, ranks: int, eps: float) -> str:
    """One line of the table: a layer's steps of `ranks` microbatches each."""
    steps = [decisions[first : first + ranks] for first in range(0, len(decisions) - ranks + 1, ranks)]
    k_max = max(int(each.routing_map_TE.sum(1).max()) for each in decisions)
    counts = [np.stack([each.routing_map_TE.sum(0).numpy() for each in step]) for step in steps]
    routed = sum(int(each.sum()) for each in counts)
    fits, bounds = zip(*(capped(step, ranks, eps, k_max) for step in steps), strict=True)
    asked, kept = (
        sum(each.gates_TE.double().sum().item() for step in side for each in step) / sum(bounds)
        for side in (steps, fits)
    )
    load = [sum(fit.routing_map_TE.sum(0) for fit in step).view(ranks, -1).sum(1).numpy() for step in fits]
    rerouted, virtual = (
        sum(int(getattr(fit, name)) for step in fits for fit in step) / routed for name in ("rerouted", "displaced")
    )
    needed, plans = copied(counts, ranks, eps)
    fullest = max(over_mean(plan.load(each.sum(0), ranks)) for plan, each in zip(plans, counts, strict=True))
    local = counts[0].shape[1] // ranks
    kept_plans = [
        plan_on(places_of(plan_copies(past, ranks, max(needed, 1), eps), local), now, ranks, eps)
        for past, now in zip(accumulate(counts[:-1]), counts[1:], strict=True)
    ]
    behind = [over_mean(plan.load(now.sum(0), ranks)) for plan, now in zip(kept_plans, counts[1:], strict=True)]
    moved = sum(int(plan.flow_GS[plan.rank_G != plan.expert_G // local].sum()) for plan in plans)
    before = [over_mean(each.sum(0).reshape(ranks, -1).sum(1)) for each in counts]
    return (
        f"| {ranks} | {layer} | {max(before):.3f} | **{max(map(over_mean, load)):.3f}** | {rerouted:.1%} "
        f"| {virtual:.2%} | {asked:.3f}, {kept:.3f} | **{fullest:.3f}** | {needed} | {moved / routed:.1%} "
        f"| {sum(behind) / len(behind):.3f}, {sum(before[1:]) / len(before[1:]):.3f} |"
    )


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--ep", type=int, nargs="+", default=[2, 4, 8], help="expert-parallel sizes")
    parser.add_argument("--eps", type=float, default=0.05, help="allowed excess over the mean")
    parser.add_argument("--steps", type=int, default=4, help="steps of the largest size; smaller ones have more")
    options, words = parser.parse_known_args()
    torch.set_num_threads(1)
    layers = record(words, options.steps * max(options.ep))
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for ranks in options.ep:
        for layer, decisions in layers.items():
            print(row(decisions, layer, ranks, options.eps), flush=True)


if __name__ == "__main__":
    main()
