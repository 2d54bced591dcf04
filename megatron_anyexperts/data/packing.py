"""Packs samples into rows of exactly S positions."""

import hashlib

import numpy as np

from megatron_anyexperts.data.microbatch import FIELDS, PADDING
from megatron_anyexperts.data.samples import Planned
from megatron_anyexperts.media import MediaShape


def pack_rows(sizes: list[tuple[int, ...]], limits: tuple[int, ...]) -> list[list[int]]:
    """Assign samples to rows by best fit, largest first.

    Args:
        sizes: what each sample takes of every budget; the first budget (positions) decides the order and the fit.
        limits: what a row offers of every budget.

    Returns:
        Rows as lists of sample indices, ascending within a row. Every sample is in exactly one row.

    Raises:
        ValueError: a sample alone exceeds a limit.
    """
    rows: list[list[int]] = []
    room: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: (*(-size for size in sizes[i]), i)):
        size = sizes[index]
        if any(need > limit for need, limit in zip(size, limits, strict=True)):
            raise ValueError(f"sample {index} takes {size} of a row that offers {limits}")
        best = min(
            (row for row, left in enumerate(room) if all(n <= f for n, f in zip(size, left, strict=True))),
            key=lambda row: room[row][0],
            default=None,
        )
        if best is None:
            best = len(rows)
            rows.append([])
            room.append(list(limits))
        rows[best].append(index)
        room[best] = [free - need for need, free in zip(size, room[best], strict=True)]
    return [sorted(row) for row in rows]


def row_order(keys: list[list[str]]) -> list[int]:
    """A fixed order of rows that does not follow their size: best fit would emit the full, large-sample rows first."""
    return sorted(range(len(keys)), key=lambda row: hashlib.blake2b("\0".join(keys[row]).encode()).digest())


def assemble_row(samples: list[Planned], seq_length: int, shape: MediaShape, pad_id: int) -> dict[str, np.ndarray]:
    """Lay decoded samples side by side in one row of a microbatch (see `microbatch.FIELDS`), padded to `seq_length`."""
    if (needed := sum(sample.size[0] for sample in samples)) > seq_length:
        raise ValueError(f"samples of {needed} positions do not fit a row of {seq_length}")
    padding = PADDING | {"tokens": pad_id, "labels": pad_id}
    arrays = {
        name: np.full(seq_length, padding.get(name, 0), field.numpy)
        for name, field in FIELDS.items()
        if not field.ragged
    }
    start = 0
    for segment, sample in enumerate(samples, start=1):
        length = len(sample.tokens) - 1
        span = slice(start, start + length)
        arrays["tokens"][span] = sample.tokens[:-1]
        arrays["labels"][span] = sample.tokens[1:]
        arrays["loss_mask"][span] = sample.target[1:]
        arrays["position_ids"][span] = np.arange(length)
        arrays["segment_ids"][span] = segment
        arrays["token_modality"][span] = sample.modality[:-1]
        arrays["sample_modality"][span] = sample.sample_modality
        start += length
    patches = [patch for sample in samples for patch in sample.frames]
    clips = [clip for sample in samples for clip in sample.clips]
    empty_patches, empty_clip = np.zeros((0, shape.patch_values), np.float32), np.zeros((0, shape.n_mels), np.float32)
    arrays["image_patches"] = np.concatenate([empty_patches, *patches])
    arrays["image_grids"] = np.array([g for sample in samples for g in sample.grids], np.int32).reshape(-1, 3)
    arrays["audio_features"] = np.concatenate([empty_clip, *clips])
    arrays["audio_lengths"] = np.array([len(clip) for clip in clips], np.int32)
    return arrays
