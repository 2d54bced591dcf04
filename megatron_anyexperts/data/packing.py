"""Packs samples into rows of exactly S positions and rows into microbatches."""

import hashlib
from typing import Any

import numpy as np
import torch

from megatron_anyexperts.data.samples import Planned
from megatron_anyexperts.media import PAD, MediaShape


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
    """Lay decoded samples side by side in one row of the microbatch (see `collate`), padded to `seq_length`."""
    if (needed := sum(sample.size[0] for sample in samples)) > seq_length:
        raise ValueError(f"samples of {needed} positions do not fit a row of {seq_length}")
    arrays = {
        "tokens": np.full(seq_length, pad_id, np.int64),
        "labels": np.full(seq_length, pad_id, np.int64),
        "loss_mask": np.zeros(seq_length, np.float32),
        "position_ids": np.zeros(seq_length, np.int64),
        "segment_ids": np.zeros(seq_length, np.int32),
        "token_modality": np.full(seq_length, PAD, np.int8),
        "sample_modality": np.full(seq_length, PAD, np.int8),
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


_RAGGED = ("image_patches", "image_grids", "audio_features", "audio_lengths")
_ALIGNMENT = 16  # bytes; at least the largest item of an array


def collate(rows: list[dict[str, np.ndarray]], keys: list[list[str]]) -> dict[str, Any]:
    """Join B rows into the microbatch that training consumes.

    Returns:
        tokens, labels, position_ids int64 [B, S]; loss_mask float32 [B, S]; segment_ids int32 [B, S], 0 at padding;
        token_modality, sample_modality int8 [B, S], -1 at padding; image_patches float32 [P, 3 * p * p] and
        image_grids int32 [N, 3] of all images and videos in order; audio_features float32 [F, n_mels] and
        audio_lengths int32 [M] of all clips in order; sample_keys, a list of B lists.
    """
    microbatch: dict[str, Any] = {name: torch.from_numpy(array) for name, array in _join(rows).items()}
    microbatch["sample_keys"] = keys
    return microbatch


def collate_to_buffer(rows: list[dict[str, np.ndarray]], keys: list[list[str]]) -> dict[str, Any]:
    """Like `collate`, with all arrays in one: a worker process then hands over one shared-memory segment, not eleven.

    Returns:
        buffer, uint8 [bytes]; layout, a list of (name, dtype, shape, first byte, end); sample_keys. For `from_buffer`.
    """
    arrays, layout, end = _join(rows), [], 0
    for name, array in arrays.items():
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + array.nbytes
        layout.append((name, getattr(torch, array.dtype.name), array.shape, start, end))
    buffer = np.empty(end, np.uint8)
    for name, *_, start, end in layout:
        buffer[start:end] = arrays[name].reshape(-1).view(np.uint8)
    return {"buffer": torch.from_numpy(buffer), "layout": layout, "sample_keys": keys}


def from_buffer(packed: dict[str, Any]) -> dict[str, Any]:
    """Return the microbatch of `collate`, whose tensors are views of one buffer: pinned, if that is."""
    microbatch: dict[str, Any] = {"sample_keys": packed["sample_keys"]}
    for name, dtype, shape, start, end in packed["layout"]:
        microbatch[name] = packed["buffer"][start:end].view(dtype).view(shape)
    return microbatch


def _join(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: (np.concatenate if name in _RAGGED else np.stack)([row[name] for row in rows]) for name in rows[0]}
