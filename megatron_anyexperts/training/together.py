"""Work on files that all ranks wait for or share, without a collective that waits for a disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_anyexperts.survival.manifest import digest, share_files

ROUND_S = 10.0
Outcome = tuple[Any, BaseException | None]


def outcome(call: Callable[[], Any]) -> Outcome:
    """The result of `call` and None, or None and its error."""
    try:
        return call(), None
    except (Exception, CheckpointException) as error:  # torch's is no Exception but a BaseException
        return None, error


def problem_of(error: BaseException | None) -> str:
    """An error as one text; "" for none."""
    return f"{type(error).__name__}: {error}" if error else ""


def everywhere(call: Callable[[], Any], meanwhile: Callable[[], None] = lambda: None) -> list[Outcome]:
    """Run `call` on every rank and return the outcomes of all ranks, in rank order, on every rank.

    The ranks meet every `ROUND_S` seconds until all are through: however long a disk takes, no collective runs into its
    timeout.

    Args:
        call: runs beside the main thread, so it must not communicate.
        meanwhile: called on every rank after each round in which some rank was not through.
    """
    outcomes: list[Any] = [None] * torch.distributed.get_world_size()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(outcome, call)
        while True:
            wait([future], ROUND_S)
            torch.distributed.all_gather_object(outcomes, future.result() if future.done() else None)
            if None not in outcomes:
                return outcomes
            meanwhile()


def on_rank_0(call: Callable[[], Any], meanwhile: Callable[[], None] = lambda: None) -> Any:
    """Run `call` on rank 0 only, as `everywhere` does; return its result, or raise its error, on every rank."""
    result, error = tried_on_rank_0(call, meanwhile)
    if error is not None:
        raise error
    return result


def tried_on_rank_0(call: Callable[[], Any], meanwhile: Callable[[], None] = lambda: None) -> Outcome:
    """Like `on_rank_0`; returns the outcome instead of raising."""
    first = torch.distributed.get_rank() == 0
    return everywhere(call if first else lambda: None, meanwhile)[0]


def attempt(call: Callable[[], Any]) -> str:
    """Run `call`, which may communicate, on every rank; return the first rank's problem on every rank, "" for none."""
    problems: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem_of(outcome(call)[1]))
    return next(filter(None, problems), "")


def shared_digest(
    folder: Path, sizes: dict[str, int], meanwhile: Callable[[], None] = lambda: None
) -> tuple[dict[str, Any], str]:
    """Hash files by all ranks together; `sizes`, in bytes by name, must be the same on all of them.

    Returns:
        on every rank: what `manifest.digest` says of all files, and the first problem, "" for none.
    """
    share = share_files(sizes, torch.distributed.get_world_size())[torch.distributed.get_rank()]
    found: dict[str, Any] = {}
    for part, error in everywhere(lambda: digest(folder, share), meanwhile):
        if error is not None:
            return {}, problem_of(error)
        found |= part
    return found, ""
