"""Measures the all-reduce between nodes, and which node slows it down; imports torch when it runs."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Mapping


def measure(timeout_s: float, mebibytes: int | None = None) -> dict[str, object]:
    """All-reduce over one rank per node, then pairs of neighbours; call it in every rank.

    Ranks come from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. NCCL is used when there are GPUs, else gloo.

    Args:
        timeout_s: for every collective.
        mebibytes: size of the buffer; by default 256 on GPUs and 16 without.

    Returns:
        {"node", "all_reduce": GB/s of bus bandwidth, "pair": the better GB/s of this node's two pairs}. Bus bandwidth
        is bytes x 2 (n - 1) / n / seconds, so that it does not depend on the number of nodes.
    """
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    size = (mebibytes or (256 if on_gpu else 16)) * 2**20
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(seconds=timeout_s))
    rank, world = dist.get_rank(), dist.get_world_size()
    buffer = torch.ones(size // 4, device=device)

    def bus_rate(group: dist.ProcessGroup | None, members: int) -> float:
        best = float("inf")
        for _ in range(3):  # the first round also opens the connections
            buffer.fill_(1.0)
            _finish(torch, on_gpu)
            start = time.perf_counter()
            dist.all_reduce(buffer, group=group)
            _finish(torch, on_gpu)
            best = min(best, time.perf_counter() - start)
        if not bool((buffer == members).all()):
            raise RuntimeError(f"all-reduce of ones over {members} nodes gave {buffer.max().item()}")
        return size * 2 * (members - 1) / members / best / 1e9

    whole = bus_rate(None, world)
    pair = 0.0
    # Two rounds of neighbours: a node is slow itself only if it is slow with both.
    for pairs in pairings(world):
        groups = [dist.new_group(list(members)) for members in pairs]
        for members, group in zip(pairs, groups, strict=True):
            if rank in members:
                pair = max(pair, bus_rate(group, 2))
        dist.barrier()
    dist.destroy_process_group()
    return {"node": os.environ.get("SLURMD_NODENAME", str(rank)), "all_reduce": whole, "pair": pair}


def pairings(world: int) -> list[list[tuple[int, int]]]:
    """Two rounds of disjoint neighbour pairs; from 3 ranks on every rank is in at least one, most in two.

    A single pair makes one round, since a second would measure the same.
    """
    rounds = [
        [(rank, rank + 1) for rank in range(0, world - 1, 2)],
        [(rank, (rank + 1) % world) for rank in range(1, world - (world % 2), 2)],
    ]
    return rounds[:1] if world == 2 else [pairs for pairs in rounds if pairs]


def slow_nodes(rates: Mapping[str, float], least: float) -> dict[str, str]:
    """Nodes whose better pair stays below `least` GB/s, with the reason."""
    return {node: f"{rate:.2f} GB/s to its neighbours, not {least:g}" for node, rate in rates.items() if rate < least}


def _finish(torch, on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()
