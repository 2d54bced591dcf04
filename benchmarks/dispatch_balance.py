"""Load of the expert ranks under skewed routing: dispatch cap against stock dropless, capacity dropping, expert bias.

    python benchmarks/dispatch_balance.py                  # EP 2 and 4 on real processes, 8, 64 and 256 by the planner
    python benchmarks/dispatch_balance.py --ep 2 64 --steps 8

All methods see the same logits in the same run. `max/mean` is the fullest rank over the mean, the worst of all steps.

- dropless: top-k as it is, Megatron's default.
- capacity: Megatron's `apply_router_token_dropping` with capacity factor 1 + eps; `dropped` slots are lost.
- bias: expert bias (aux-loss-free), moved by `--bias-rate` per step against each expert's excess, after
  `--bias-steps` warm-up steps on the same workload whose rate falls from 0.05 to that.
- cap: this project's dispatcher; rerouted slots go to another expert, virtual ones stay local, none is dropped.
- lost gates: gate mass routed that no expert receives under the cap, and in brackets how many times the least that any
  assignment of all tokens loses (a lower bound, from the Lagrangian dual of that linear program).

A second table is about copies of hot experts (`moe/copies.py`), planned from the same counts and not executed:

- R: the fewest copies a rank that keep every step within 1 + eps.
- copies: fullest rank over the mean; number: copies of all ranks in the step that has most.
- MB sent, by one owner: their weights in bf16, at hidden size 2048 and FFN size 512; in all, and from one rank.
- slots moved: computed by a copy; plan ms: median CPU time of the plan.

EP 2 and 4 run `SlotDispatcher` on as many processes; larger EP run the same planning and rerouting functions for every
source in one process. "plan time" is CPU time of one layer on one rank (median of 7): `plan_dispatch` alone, for
comparison, and the whole that the cap does but for exchanges.
"""

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from balance_copies import COPY_COLUMNS, copied
from balance_workloads import WORKLOADS, Setting, decision_of, least_lost, logits, route
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from torch import Tensor

from megatron_anyexperts.moe.cap import fit_sources
from megatron_anyexperts.moe.config import AnyExpertsConfig
from megatron_anyexperts.moe.dispatcher import SlotDispatcher
from megatron_anyexperts.moe.prices import Offers, find_prices
from megatron_anyexperts.moe.quotas import plan_dispatch, slot_cap
from megatron_anyexperts.moe.reroute import settled
from megatron_anyexperts.platform import cpu

REAL_PROCESSES = (2, 4)
COLUMNS = (
    "workload",
    "dropless",
    "capacity",
    "dropped",
    "bias",
    "**cap**",
    "rerouted",
    "virtual",
    "lost gates",
    "dropless / cap",
)
HIDDEN = 16


@dataclass(frozen=True)
class Step:
    """One step under the cap: slots the fullest rank received, what became of the slots routed, and their gates."""

    fullest: int
    routed: int
    received: int
    rerouted: int
    virtual: int
    gates_routed: float
    gates_received: float

    @property
    def lost(self) -> int:
        return self.routed - self.received - self.virtual


def over_mean(counts_E: Tensor, ranks: int) -> float:
    load_P = counts_E.view(ranks, -1).sum(1)
    return (load_P.max() / load_P.double().mean()).item()


@dataclass
class Row:
    """Worst max over mean of each method, and shares of slots moved or lost over all steps."""

    dropless: float = 0.0
    capacity: float = 0.0
    dropped: float = 0.0
    bias: float = 0.0
    cap: float = 0.0
    rerouted: float = 0.0
    virtual: float = 0.0
    lost: float = 0.0


def peers(setting: Setting, workload: str, options: argparse.Namespace) -> Row:
    """What Megatron's own means give on the same logits."""
    row, dropped, total = Row(), 0, 0
    bias_E = torch.zeros(setting.experts)
    for step in range(-options.bias_steps, options.steps):
        all_logits = [logits(setting, workload, step % 1000, source) for source in range(setting.ranks)]
        counts_E = route(torch.cat(all_logits), setting.k, bias_E)[1].sum(0)
        if step >= 0:
            row.bias = max(row.bias, over_mean(counts_E, setting.ranks))
            kept_E = torch.zeros(setting.experts, dtype=torch.int64)
            demand_E = kept_E.clone()
            for source_logits in all_logits:
                score_TE, routed_TE = route(source_logits, setting.k)
                demand_E += routed_TE.sum(0)
                if len(source_logits):
                    _, kept_TE = apply_router_token_dropping(
                        score_TE * routed_TE, routed_TE, setting.k, 1 + options.eps, "probs"
                    )
                    kept_E += kept_TE.sum(0)
            row.dropless = max(row.dropless, over_mean(demand_E, setting.ranks))
            row.capacity = max(row.capacity, over_mean(kept_E, setting.ranks))
            dropped += (demand_E - kept_E).sum().item()
            total += demand_E.sum().item()
        left = max(0.0, -step / options.bias_steps)
        rate = options.bias_rate * (0.05 / options.bias_rate) ** left
        bias_E += rate * torch.sign(counts_E.double().mean() - counts_E)
    row.dropped = dropped / total
    return row


def planned_step(setting: Setting, workload: str, step: int, eps: float) -> Step:
    """Plan and reroute for all sources in this process."""
    decisions = [decision_of(setting, workload, step, source) for source in range(setting.ranks)]
    under = fit_sources(decisions, setting.ranks, setting.k, eps)
    fitted, load_P = under.fitted, under.known_SE.sum(0).view(setting.ranks, -1).sum(1)
    routed = sum(decision.routing_map_TE.sum() for decision in decisions)
    assert load_P.max() <= slot_cap(routed, setting.ranks, eps)
    rerouted, virtual = (int(sum(getattr(fit, name) for fit in fitted)) for name in ("rerouted", "displaced"))
    gates = [sum(x.gates_TE.double().sum().item() for x in side) for side in (decisions, fitted)]
    return Step(load_P.max().item(), routed.item(), load_P.sum().item(), rerouted, virtual, *gates)


def _dispatch_on_rank(rank: int, setting: Setting, options: argparse.Namespace, folder: str) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", CUDA_DEVICE_MAX_CONNECTIONS="1")
    torch.set_num_threads(1)
    cpu.bridge()
    init = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=setting.ranks)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=setting.ranks)
    config = AnyExpertsConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=setting.experts,
        moe_router_topk=setting.k,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        anyexperts_dispatch_eps=options.eps,
    )
    local = setting.experts // setting.ranks
    groups = ProcessGroupCollection.use_mpu_process_groups(["ep", "expt_tp", "tp_ep"])
    dispatcher = SlotDispatcher(config, local, list(range(rank * local, (rank + 1) * local)), groups)
    steps = {}
    for workload in WORKLOADS:
        for step in range(options.steps):
            decision = decision_of(setting, workload, step, rank)
            sent = dispatcher.dispatch(torch.ones(len(decision.gates_TE), HIDDEN), decision)
            gates = decision.gates_TE.double().sum(), sent.expert_probs.double().sum()
            mine = torch.tensor([decision.routing_map_TE.sum(), len(sent.expert_input), *gates], dtype=torch.float64)
            everyone = [torch.empty_like(mine) for _ in range(setting.ranks)]
            torch.distributed.all_gather(everyone, mine)
            table = torch.stack(everyone)
            assert table[:, 1].max() <= sent.load.cap
            routed, received, *gates = table.sum(0).tolist()
            moved = sent.load.rerouted.item(), sent.load.displaced.item()
            steps[workload, step] = Step(int(table[:, 1].max()), int(routed), int(received), *moved, *gates)
    if rank == 0:
        torch.save(steps, Path(folder, "steps.pt"))
    torch.distributed.destroy_process_group()


def real_steps(setting: Setting, options: argparse.Namespace) -> dict[tuple[str, int], Step]:
    """Dispatch on real processes; slots are counted in the buffers that arrive."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_dispatch_on_rank, (setting, options, folder), nprocs=setting.ranks)
        return torch.load(Path(folder, "steps.pt"), weights_only=False)


def plan_milliseconds(setting: Setting, workload: str) -> tuple[float, float]:
    """Median CPU time of one layer on one rank from the gathered [S, E] counts: `plan_dispatch` alone, and all that the
    cap does but for exchanges."""
    decisions = [decision_of(setting, workload, 0, source) for source in range(setting.ranks)]
    counts_SE = torch.stack([decision.routing_map_TE.sum(0) for decision in decisions])
    ranks, k, away = setting.ranks, setting.k, 0.0
    others = [Offers.of(decision, k, False) for decision in decisions[:-1]]

    def count(price_P: Tensor, counts_PB: Tensor) -> None:
        nonlocal away
        mine.count(price_P, counts_PB)
        begun = time.thread_time()
        for each in others:
            each.count(price_P, counts_PB)
        away += time.thread_time() - begun

    plans, wholes = [], []
    for _ in range(7):
        start = time.thread_time()
        demand_SP = counts_SE.view(ranks, ranks, -1).sum(2)
        slots, load_P = int(demand_SP.sum()), demand_SP.sum(0)
        cap = slot_cap(torch.tensor(slots), ranks, 0.05).item()
        if load_P.max() > cap:
            away, mine = 0.0, Offers.of(decisions[-1], k, False)
            settled(decisions[-1], *mine.choose(find_prices(count, ranks, cap, slots, demand_SP.device)))
        wholes.append(time.thread_time() - start - away)
        start = time.thread_time()
        plan_dispatch(demand_SP, cap)
        plans.append(time.thread_time() - start)
    return 1000 * median(plans), 1000 * median(wholes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", type=int, nargs="+", default=[2, 4, 8, 64, 256], help="expert-parallel sizes")
    parser.add_argument("--eps", type=float, default=0.05, help="allowed excess over the mean")
    parser.add_argument("--steps", type=int, default=3, help="steps measured per workload")
    parser.add_argument("--bias-steps", type=int, default=24, help="warm-up steps of the expert bias")
    parser.add_argument("--bias-rate", type=float, default=0.001, help="step of the expert bias")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"max over mean load of expert ranks, worst of {options.steps} steps; eps = {options.eps}")
    for ranks in options.ep:
        setting = Setting.of(ranks)
        real = real_steps(setting, options) if ranks in REAL_PROCESSES else None
        print(
            f"\nEP {ranks}, {setting.experts} experts, top-{setting.k}, {setting.tokens} tokens per rank, "
            f"{'real processes' if real else 'planner alone'}"
        )
        timed = ((name, *plan_milliseconds(setting, name)) for name in ("balanced", "hot rank", "hot experts"))
        print("plan_dispatch, whole: " + ", ".join(f"{name} {plan:.2f}, {whole:.2f} ms" for name, plan, whole in timed))
        print(f"\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
        for workload in WORKLOADS:
            row = peers(setting, workload, options)
            steps = [
                real[workload, step] if real else planned_step(setting, workload, step, options.eps)
                for step in range(options.steps)
            ]
            routed = sum(step.routed for step in steps)
            row.cap = max(step.fullest * ranks / step.routed for step in steps)
            row.rerouted, row.virtual, row.lost = (
                sum(getattr(step, name) for step in steps) / routed for name in ("rerouted", "virtual", "lost")
            )
            routed_mass = sum(step.gates_routed for step in steps)
            lost_mass = routed_mass - sum(step.gates_received for step in steps)
            least = sum(least_lost(setting, workload, step, options.eps) for step in range(options.steps))
            times = f" ({lost_mass / least:.2f})" if least > 1e-6 * routed_mass else ""
            print(
                f"| {workload} | {row.dropless:.3f} | {row.capacity:.3f} | {row.dropped:.1%} | {row.bias:.3f} "
                f"| **{row.cap:.3f}** | {row.rerouted:.1%} | {row.virtual:.2%} | {lost_mass / routed_mass:.3%}{times} "
                f"| {row.dropless / row.cap:.2f} |",
                flush=True,
            )
            assert row.lost == 0, "slots vanished under the cap"
        print(f"\n| {' | '.join(COPY_COLUMNS)} |\n|{' --- |' * len(COPY_COLUMNS)}")
        for workload in WORKLOADS:
            print(copied(setting, workload, options.steps, options.eps), flush=True)


if __name__ == "__main__":
    main()
