"""What copies of hot experts make of a workload of the balance benchmark: planned, not executed."""

import time

import numpy as np
from balance_workloads import Setting, decision_of

from megatron_anyexperts.moe.copies import plan_copies
from megatron_anyexperts.moe.quotas import slot_cap

COPY_COLUMNS = (
    "workload",
    "R",
    "**copies**",
    "number",
    "MB sent",
    "by one owner",
    "slots moved",
    "plan ms",
)
COPIES_PER_RANK = (1, 2, 4, 8, 16)
# An expert of hidden size 2048 and FFN size 512 with a gated linear unit, in bf16.
EXPERT_MEGABYTES = 3 * 2048 * 512 * 2 / 1e6


def copied(setting: Setting, workload: str, steps: int, eps: float) -> str:
    """Row of the table: with the fewest copies a rank that keep every step within 1 + eps, or the most tried."""
    counts = [
        np.stack([decision_of(setting, workload, step, s).routing_map_TE.sum(0).numpy() for s in range(setting.ranks)])
        for step in range(steps)
    ]
    for per_rank in COPIES_PER_RANK:
        plans, times = [], []
        for counts_SE in counts:
            for _ in range(20):
                start = time.thread_time()
                plan = plan_copies(counts_SE, setting.ranks, per_rank, eps)
                times.append(time.thread_time() - start)
            plans.append(plan)
        caps = [int(slot_cap(int(counts_SE.sum()), setting.ranks, eps)) for counts_SE in counts]
        if all(plan.cap <= cap for plan, cap in zip(plans, caps, strict=True)):
            break
    fullest, copies, most_of_one, moved, total = 0.0, 0, 0, 0, 0
    for counts_SE, plan in zip(counts, plans, strict=True):
        load_P = plan.load(counts_SE.sum(0), setting.ranks)
        owner_G = plan.expert_G // (counts_SE.shape[1] // setting.ranks)
        assert load_P.sum() == counts_SE.sum(), "slots vanished"
        away_G = plan.rank_G != owner_G
        fullest = max(fullest, load_P.max() / load_P.mean())
        copies = max(copies, plan.copies)
        most_of_one = max(most_of_one, np.bincount(owner_G[away_G], minlength=1).max())
        moved, total = moved + plan.flow_GS[away_G].sum(), total + counts_SE.sum()
    needed = per_rank if copies else 0
    return (
        f"| {workload} | {needed} | **{fullest:.3f}** | {copies} | {copies * EXPERT_MEGABYTES:.0f} | "
        f"{most_of_one * EXPERT_MEGABYTES:.0f} | {moved / total:.1%} | {1000 * np.median(times):.2f} |"
    )
