"""How a packed row is cut for context parallelism: which of its places each rank holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def padded_documents(lengths: Sequence[int], ranks: int, multiple: int = 1) -> tuple[int, ...]:
    """Lengths of a row's documents once each can be cut into 2 x `ranks` equal chunks.

    Args:
        lengths: of the documents, padding as one more.
        ranks: of the context-parallel group.
        multiple: what the length of a rank's part has to be a multiple of.

    Returns:
        As many lengths, and one more where the row has to be filled up: it is no shorter than it was, so that rows with
        padding to spare keep one shape.
    """
    chunks = 2 * ranks
    padded = [-(-length // chunks) * chunks for length in lengths]
    unit = int(np.lcm(chunks, ranks * multiple))
    missing = -(-max(sum(lengths), sum(padded)) // unit) * unit - sum(padded)
    return (*padded, missing) if missing else tuple(padded)


def held_places(padded: Sequence[int], ranks: int) -> np.ndarray:
    """Places of the padded row that each rank holds, in its order, int64 [ranks, places / ranks].

    Of each document's 2 x `ranks` chunks rank r holds chunks r and 2 x `ranks` - 1 - r: of a causal document then all
    ranks attend to the same number of pairs. Source: Megatron's packed sequences, Transformer Engine's
    `thd_get_partitioned_indices`.

    Args:
        padded: lengths that 2 x `ranks` divides; see `padded_documents`.
    """
    parts, start = [], 0
    for length in padded:
        chunks_CN = np.arange(start, start + length).reshape(2 * ranks, -1)
        parts.append(np.stack((chunks_CN[:ranks], chunks_CN[: ranks - 1 : -1]), axis=1).reshape(ranks, -1))
        start += length
    return np.concatenate(parts, axis=1)


def original_places(lengths: Sequence[int], padded: Sequence[int]) -> np.ndarray:
    """Where each place of the padded row was before, int64; -1 for what was added.

    Args:
        lengths: of the documents before.
        padded: the same after `padded_documents`.
    """
    places, start = [], 0
    for index, after in enumerate(padded):
        length = lengths[index] if index < len(lengths) else 0
        places.append(np.where(np.arange(after) < length, start + np.arange(after), -1))
        start += length
    return np.concatenate(places)
