"""Launches and host waits of one mixture layer beside Megatron's: the tables of docs/routing.md and docs/dispatch.md.

    python benchmarks/launches.py

Runs anywhere; on a CPU the kernels run in Triton's interpreter. See megatron_anyexperts/checks/operator_counts.py for
what is counted.
"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_anyexperts.checks.launches import Counted, count_ours, count_stock
from megatron_anyexperts.platform import cpu

ROUTER_ALONE = ("budget slack", "centred gradient", "z-loss")
"""Variants whose other parts are those of a row before."""


def main() -> None:
    """Print one row for each part and implementation."""
    cpu.bridge()
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder, 'rendezvous')}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        print("| part | implementation | forward | backward | waits |\n| --- | --- | --- | --- | --- |")
        variants = {
            "Megatron": count_stock(),
            "ours, operators": count_ours(anyexperts_kernels="off"),
            "ours, kernels": count_ours(anyexperts_kernels="on"),
            "ours, kernels, budget slack": count_ours(anyexperts_kernels="on", anyexperts_budget_slack=1.1),
            "ours, kernels, centred gradient": count_ours(
                anyexperts_kernels="on", anyexperts_importance_gradient="centred"
            ),
            "ours, kernels, z-loss": count_ours(anyexperts_kernels="on", moe_z_loss_coeff=1e-3),
            "ours, kernels, cap": count_ours(anyexperts_kernels="on", anyexperts_dispatch_eps=0.1),
        }
        for part in ("router", "dispatch", "figures"):
            for name, counted in variants.items():
                if part in counted and (part == "router" or name.split(", ")[-1] not in ROUTER_ALONE):
                    print(_row(part, name, counted[part]))
        torch.distributed.destroy_process_group()


def _row(part: str, name: str, counted: Counted) -> str:
    passes = [each for each in (counted.forward, counted.backward) if each is not None]
    cells = [part, name, *(str(each.launches.total()) for each in passes), *["-"] * (2 - len(passes))]
    waits = "-" if name == "Megatron" else sum(each.waits.total() for each in passes)
    return f"| {' | '.join(cells)} | {waits} |"


if __name__ == "__main__":
    main()
