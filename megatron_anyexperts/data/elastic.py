"""State of all data streams as one object that does not know how many ranks saved it.

A run has V logical streams. With dp_size ranks each rank runs V / dp_size of them as worker processes, in stream
order; rank r emits its streams round robin. One *round* is one microbatch of each stream. After whole rounds the state
of a stream does not depend on the layout, so states can be dealt out to any number of ranks that divides V.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.energon.savable_loader import SavableDataLoaderState

from megatron_anyexperts.data import plain_state

VERSION = 4  # 1 held pickles, which run code when they are read; 2 counted no microbatches, 3 no stages to come


def valid_dp_sizes(streams: int) -> list[int]:
    """Data-parallel sizes that divide the streams evenly, ascending."""
    return [size for size in range(1, streams + 1) if streams % size == 0]


def streams_per_rank(streams: int, dp_size: int) -> int:
    """Worker processes of each rank.

    Raises:
        ValueError: `dp_size` does not divide `streams`.
    """
    if dp_size < 1 or streams % dp_size:
        sizes = ", ".join(map(str, valid_dp_sizes(streams)))
        raise ValueError(f"dp_size={dp_size} does not divide data_streams={streams}; use one of {sizes}")
    return streams // dp_size


def check_streams(streams: int, dp_size: int, ranks_of_one: int = 1) -> None:
    """Make sure that data-parallel ranks can share the streams.

    Args:
        streams, dp_size: see `streams_per_rank`.
        ranks_of_one: ranks of one data-parallel rank.

    Raises:
        ValueError: with the numbers of ranks that can.
    """
    if dp_size < 1 or streams % dp_size:
        sizes = ", ".join(str(size * ranks_of_one) for size in valid_dp_sizes(streams))
        raise ValueError(
            f"{dp_size * ranks_of_one} ranks, dp_size={dp_size}, does not divide data_streams={streams}; "
            f"use one of {sizes} ranks"
        )


def check_global_batch(global_batch_size: int, micro_batch_size: int, streams: int) -> None:
    """Make sure that a training step consumes whole rounds.

    Raises:
        ValueError: it does not, so that the samples of a step would depend on the number of ranks.
    """
    round_size = micro_batch_size * streams
    if global_batch_size % round_size:
        below = global_batch_size // round_size * round_size
        nearest = " or ".join(str(size) for size in (below, below + round_size) if size)
        raise ValueError(
            f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size={micro_batch_size} x "
            f"data_streams={streams} = {round_size}; use {nearest}, or fewer data_streams"
        )


@dataclass(frozen=True)
class RankState:
    """What one rank contributes to a checkpoint.

    Attributes:
        rounds: whole rounds that every stream has emitted since the start of the run.
        streams: state of each of the rank's streams as JSON, in order; None before the first microbatch of the run.
    """

    rounds: int
    streams: list[bytes] | None


def split_state(state: SavableDataLoaderState | None, rounds: int) -> RankState:
    """Take Energon's state of one rank apart into its streams."""
    if state is None:
        return RankState(rounds, None)
    if state.next_worker_id != 0:
        raise ValueError(f"the rank stopped in the middle of a round, before stream {state.next_worker_id} of its own")
    return RankState(rounds, [plain_state.dumps(worker) for worker in state.worker_states])


def has_ended(stream: bytes) -> bool:
    """Whether a stream that makes one pass has read its last sample.

    Energon (7.4.1) would start such a stream over on restore, with its buffers refilled.
    """

    def epochs(state: Any) -> list[int]:
        if "_epoch_count" in state:
            return [state["_epoch_count"]]
        return [count for inner in state.get("datasets", ()) for count in epochs(inner)]

    return all(count > 0 for count in epochs(plain_state.loads(stream).state.dataset_state))


def merge_states(
    ranks: list[RankState], fingerprint: dict[str, Any], micro_batch_size: int, mixture: dict[str, Any]
) -> dict[str, Any]:
    """Join the states of all ranks, in rank order, into one for the checkpoint.

    Args:
        ranks: in rank order.
        fingerprint: the settings that must not change.
        micro_batch_size: rows of a microbatch.
        mixture: the schedule of the mixture, as plain values.

    Returns:
        Plain values, and under ``streams`` one uint8 tensor per stream (empty list at the start of a run).

    Raises:
        ValueError: ranks disagree on how far they are.
    """
    rounds = {rank.rounds for rank in ranks}
    started = {rank.streams is not None for rank in ranks}
    if len(rounds) != 1 or len(started) != 1:
        raise ValueError(f"ranks are at different rounds {sorted(rounds)}; save between training steps only")
    streams = [stream for rank in ranks for stream in rank.streams or ()]
    return {
        "version": VERSION,
        "rounds": rounds.pop(),
        "micro_batch_size": micro_batch_size,
        "fingerprint": fingerprint,
        "mixture": mixture,
        "streams": [torch.frombuffer(bytearray(stream), dtype=torch.uint8) for stream in streams],
    }


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """One line per setting in which two fingerprints differ."""
    names = sorted(saved.keys() | current.keys())
    return [
        f"{name}: checkpoint {saved.get(name)!r}, now {current.get(name)!r}"
        for name in names
        if saved.get(name) != current.get(name)
    ]


def rank_state(
    state: dict[str, Any], fingerprint: dict[str, Any], dp_rank: int, dp_size: int
) -> SavableDataLoaderState | None:
    """Deal a merged state out to one rank of any layout.

    Args:
        state: what `merge_states` returned.
        fingerprint: the settings of now.
        dp_rank, dp_size: place in the layout of now.

    Returns:
        What Energon's loader restores from; None at the start of a run.

    Raises:
        ValueError: another version, other settings than those saved, a damaged state, or a size that does not divide
            the streams.
    """
    if state.get("version") != VERSION:
        raise ValueError(
            f"data state of version {state.get('version')!r}; this release reads version {VERSION}: finish the run "
            "with the release that began it, or load its weights into a new run with --load CHECKPOINTS --finetune"
        )
    if changed := differences(state["fingerprint"], fingerprint):
        raise ValueError(
            "the data settings differ from those of the checkpoint, so its position in the data is meaningless:\n  "
            + "\n  ".join(changed)
            + "\nrestore these settings, or start the data anew without loading the data state"
        )
    workers = [plain_state.loads(stream.numpy().tobytes()) for stream in state["streams"]]
    if not workers:
        return None
    share = streams_per_rank(len(workers), dp_size)
    return SavableDataLoaderState(
        worker_states=workers[dp_rank * share : (dp_rank + 1) * share],
        next_worker_id=0,
        micro_batch_size=state["micro_batch_size"],
    )
