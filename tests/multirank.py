"""Runs a function on several real processes that talk gloo over loopback."""

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.preloaded"])


def free_port() -> int:
    """Return a TCP port that is free on loopback right now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _rank_main(rank: int, fn: Callable, world_size: int, port: int, folder: str, args: tuple, seconds: float) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        CUDA_DEVICE_MAX_CONNECTIONS="1",
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    from megatron_anyexperts.platform import cpu

    cpu.bridge()
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    result = Path(folder, f"{rank}.pkl")
    try:
        result.write_bytes(pickle.dumps((True, fn(rank, world_size, *args))))
    except BaseException:
        result.write_bytes(pickle.dumps((False, traceback.format_exc())))
        raise
    finally:
        torch.distributed.destroy_process_group()


def run_ranks(fn: Callable, world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on `world_size` processes and return their results in rank order.

    Args:
        fn: a function at module level; its result and `args` must be picklable.
        world_size: number of processes.
        timeout: seconds until the ranks are killed.

    Raises:
        AssertionError: a rank raised (its traceback is in the message), died, or ran out of time.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [
            FORKED.Process(target=_rank_main, args=(rank, fn, world_size, port, folder, args, timeout), daemon=False)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout)
        stuck = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for process in ranks:
            process.kill()
            process.join()
        results = [
            pickle.loads(file.read_bytes()) if (file := Path(folder, f"{rank}.pkl")).exists() else None
            for rank in range(world_size)
        ]
    failures = [f"rank {rank}:\n{result[1]}" for rank, result in enumerate(results) if result and not result[0]]
    assert not failures, "\n".join(failures)
    assert not stuck, f"ranks {stuck} were still running after {timeout} s"
    died = [rank for rank, result in enumerate(results) if result is None]
    assert not died, f"ranks {died} died with exit codes {[ranks[rank].exitcode for rank in died]}"
    return [result[1] for result in results]
