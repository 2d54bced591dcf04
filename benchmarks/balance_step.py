"""Forward and backward of one layer on real ranks under a hot rank: no remedy, the cap, expert copies, and the ideal.

    python benchmarks/balance_step.py                # EP 2 and EP 4, a process each, gloo over loopback
    python benchmarks/balance_step.py --ranks 2      # what two cores can run at once
    python benchmarks/balance_step.py --workload "hot rank" "hot expert" "mild"

Every variant routes the same number of slots. The ideal is a layer whose routing is balanced by itself, without cap or
copies. Rounds interleave all variants. Two clocks: wall time of the step (barrier to barrier), which means what it says
only with a core for each rank and an idle machine; and processor time of the busiest rank, which other load and waiting
for others do not enter.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

from megatron_anyexperts.moe.config import AnyExpertsConfig
from megatron_anyexperts.moe.layer import AnyExpertsMoELayer
from megatron_anyexperts.moe.router import AnyExpertsRouter
from megatron_anyexperts.platform import cpu

# Added to the scores (sigmoid, about 0.5 +- 0.1) that choose experts: of all experts of rank 0, or of its first.
WORKLOADS = {"hot rank": (True, 0.12), "mild": (True, 0.02), "hot expert": (False, 1.0)}
CAP = {"anyexperts_dispatch_eps": 0.05}
COPIES = {"anyexperts_balance": "copies", "anyexperts_copies_eps": 0.05}


def build(options: argparse.Namespace, ranks: int, **balance) -> AnyExpertsMoELayer:
    """One layer with freshly seeded, hence equal, weights."""
    config = AnyExpertsConfig(
        num_layers=1,
        hidden_size=options.hidden,
        num_attention_heads=8,
        ffn_hidden_size=options.ffn,
        moe_ffn_hidden_size=options.ffn,
        num_moe_experts=options.experts,
        expert_model_parallel_size=ranks,
        moe_router_topk=options.topk,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        anyexperts_alpha=0.0,
        **balance,
    )
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    spec = get_moe_module_spec(False, options.experts, False).keywords["submodules"]
    layer = AnyExpertsMoELayer(
        config, replace(spec, router=AnyExpertsRouter), layer_number=1, pg_collection=get_default_pg_collection()
    )
    layer.set_layer_number(1)
    return layer


def skew(layer: AnyExpertsMoELayer, workload: str) -> None:
    """Make the layer's router prefer the experts of rank 0, or the first of them, as the workload says."""
    layer.router.expert_bias.zero_()
    if workload != "balanced":
        whole_rank, push = WORKLOADS[workload]
        layer.router.expert_bias[: layer.num_local_experts if whole_rank else 1] = push


def measure(rank: int, ranks: int, options: argparse.Namespace, folder: str) -> None:
    """On one rank: time all variants; rank 0 prints."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    cpu.bridge()
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{Path(folder, 'rendezvous')}", rank=rank, world_size=ranks
    )
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    copies = COPIES | {"anyexperts_copies_per_rank": options.copies_per_rank}
    layers = {name: build(options, ranks, **remedy) for name, remedy in (("off", {}), ("cap", CAP), ("copies", copies))}
    variants = [("balanced", "off"), ("balanced", "copies")]
    variants += [(workload, remedy) for workload in options.workload for remedy in layers]
    hidden = torch.randn(
        options.tokens, 1, options.hidden, generator=torch.Generator().manual_seed(rank), requires_grad=True
    )
    wall, busy, loads = ({variant: [] for variant in variants} for _ in range(3))
    for turn in range(options.rounds + 1):
        for workload, remedy in variants:
            layer = layers[remedy]
            skew(layer, workload)
            layer.zero_grad(set_to_none=True)
            torch.distributed.barrier()
            start = time.perf_counter(), time.process_time()
            layer(hidden)[0].sum().backward()
            spent = torch.tensor([0.0, time.process_time() - start[1]])
            torch.distributed.barrier()
            spent[0] = time.perf_counter() - start[0]
            torch.distributed.all_reduce(spent, torch.distributed.ReduceOp.MAX)
            if turn:
                wall[workload, remedy].append(spent[0].item())
                busy[workload, remedy].append(spent[1].item())
    for (workload, remedy), found in loads.items():
        layer = layers[remedy]
        skew(layer, workload)
        with torch.no_grad():
            sent = layer.dispatcher.dispatch(hidden.view(options.tokens, -1), layer.router(hidden, None, None))
        found.append((sent.load.received_P.max() / sent.load.received_P.double().mean()).item())
        found.append(((sent.load.copied + sent.load.rerouted) / sent.load.received_P.sum()).item())
    if rank == 0:
        print(
            f"\nEP {ranks}: {options.tokens} tokens a rank, H {options.hidden}, FFN {options.ffn}, "
            f"{options.experts} experts, top-{options.topk}, at most {options.copies_per_rank} copies a rank\n\n"
            "| workload | remedy | max over mean | moved | busiest rank, ms | of ideal | wall, ms | of ideal |\n"
            "| --- | --- | --- | --- | --- | --- | --- | --- |"
        )
        ideal = ("balanced", "off")
        for variant in variants:
            cells = "".join(
                f" {1e3 * statistics.median(times[variant]):.1f} | "
                f"{statistics.median(a / b for a, b in zip(times[variant], times[ideal], strict=True)):.2f} |"
                for times in (busy, wall)
            )
            print(f"| {variant[0]} | {variant[1]} | {loads[variant][0]:.3f} | {loads[variant][1]:.1%} |{cells}")
    torch.distributed.destroy_process_group()


def main() -> None:
    """Parse and measure on each number of ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="expert-parallel sizes")
    parser.add_argument("--workload", nargs="*", choices=WORKLOADS, default=list(WORKLOADS), help="skewed routing")
    parser.add_argument("--tokens", type=int, default=1024, help="a rank")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--copies-per-rank", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds")
    options = parser.parse_args()
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(measure, (ranks, options, folder), nprocs=ranks)


if __name__ == "__main__":
    main()
