"""One context-parallel rank's part of a microbatch: its tokens, and the pictures and sound that fill them.

A rank encodes what its own tokens need: the images, the frames of videos and the clips of which it holds a token; what
lies on the border of two ranks is encoded by both. If all ranks encoded everything and picked, the frames of a long
video, which are most of the encoders' work, would be encoded as often as there are ranks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from megatron_anyexperts.data.microbatch import FIELDS, PADDING, Microbatch, pack
from megatron_anyexperts.host_sizes import Grid, HostSizes, Ranges
from megatron_anyexperts.media import AUDIO, VISION_CODES, MediaShape
from megatron_anyexperts.row_cut import held_places, original_places, padded_documents


def cut(batch: Microbatch, rank: int, ranks: int, shape: MediaShape, multiple: int = 1) -> Microbatch:
    """This rank's part of a microbatch of one row.

    Args:
        batch: on the host.
        rank, ranks: of the context-parallel group.
        shape: media geometry.
        multiple: what the length of the part has to be a multiple of.

    Raises:
        ValueError: several rows, or placeholders and features that differ in number.
    """
    refuse_rows(len(batch["tokens"]))
    (lengths,) = batch.sizes.documents
    padded = padded_documents(lengths, ranks, multiple)
    places = original_places(lengths, padded)[held_places(padded, ranks)[rank]]
    whole = {name: tensor.numpy() for name, tensor in batch.items()}
    row = {
        name: np.where(places >= 0, whole[name][0, places], PADDING.get(name, 0)).astype(field.numpy)
        for name, field in FIELDS.items()
        if not field.ragged
    }
    kinds, held = whole["token_modality"][0], places[places >= 0]
    _check(batch.sizes, shape)
    vision, grids, first_frames, seen = _frames(batch.sizes.grids, _ordinals(kinds, held, VISION_CODES), shape)
    clips, heard = _clips(batch.sizes.clips, _ordinals(kinds, held, (AUDIO,)), shape)
    frames = _rows_of(np.array(batch.sizes.clips, int), clips)
    row["image_patches"] = whole["image_patches"][vision]
    row["image_grids"] = np.array(grids, np.int32).reshape(-1, 3)
    row["audio_features"] = whole["audio_features"][frames]
    row["audio_lengths"] = whole["audio_lengths"][clips]
    part = pack([row], batch.sample_keys)
    part["sizes"] = replace(
        part["sizes"], documents=(padded,), first_frames=first_frames, taken=(_ranges(seen), _ranges(heard))
    )
    if torch.cuda.is_available():
        part["buffer"] = part["buffer"].pin_memory()
    return Microbatch(**part)


def refuse_rows(rows: int, flag: str = "micro-batch-size") -> None:
    """Refuse several rows, with a ValueError that names the flag."""
    if rows != 1:
        raise ValueError(
            f"--{flag}={rows}: context parallelism cuts one packed row; use --{flag} 1 and a longer --seq-length"
        )


def _check(sizes: HostSizes, shape: MediaShape) -> None:
    features = sum(map(shape.image_token_count, sizes.grids)), sum(map(shape.audio_token_count, sizes.clips))
    if features != sizes.placeholders:
        raise ValueError(
            f"the tokens hold {sizes.placeholders} placeholders of vision and audio, the encoders will have {features} "
            "features: build the batch with the model's MediaShape (--vision-patch-size, --vision-spatial-merge, "
            "--audio-stride)"
        )


def _ordinals(kinds_S: np.ndarray, held: np.ndarray, codes: tuple[int, ...]) -> np.ndarray:
    """Of the placeholders of some kinds, the numbers of those that are held, in the order of the features."""
    is_kind_S = np.isin(kinds_S, codes)
    return (np.cumsum(is_kind_S) - 1)[held[is_kind_S[held]]]


def _needed(tokens_U: np.ndarray, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which units (frames, clips) hold some features, and where the features are among those of these units alone.

    Args:
        tokens_U: features of each unit, in order.
        ordinals: numbers of features.
    """
    ends_U = np.cumsum(tokens_U)
    unit_of = np.searchsorted(ends_U, ordinals, side="right")
    units = np.unique(unit_of)
    starts = np.cumsum(tokens_U[units]) - tokens_U[units]
    return units, ordinals - (ends_U - tokens_U)[unit_of] + starts[np.searchsorted(units, unit_of)]


def _rows_of(rows_U: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Numbers of the rows of some units, of which each has `rows_U`."""
    starts_U = np.cumsum(rows_U) - rows_U
    return np.concatenate([np.zeros(0, int), *(np.arange(starts_U[u], starts_U[u] + rows_U[u]) for u in units)])


def _frames(
    grids: tuple[Grid, ...], ordinals: np.ndarray, shape: MediaShape
) -> tuple[np.ndarray, list[Grid], tuple[int, ...], np.ndarray]:
    """Patches to encode, their grids, the first frame of each, and which features of these are placed."""
    item_F = np.repeat(np.arange(len(grids)), [t for t, _, _ in grids])
    time_F = np.concatenate([np.zeros(0, int), *(np.arange(t) for t, _, _ in grids)])
    tokens_F = np.array([shape.image_token_count((1, *grids[item][1:])) for item in item_F], int)
    units, placed = _needed(tokens_F, ordinals)
    patches = _rows_of(tokens_F * shape.spatial_merge**2, units)
    pieces: list[Grid] = []
    first: list[int] = []
    previous = None
    for unit in units.tolist():
        item, time = int(item_F[unit]), int(time_F[unit])
        if previous == (item, time - 1):
            pieces[-1] = (pieces[-1][0] + 1, *pieces[-1][1:])
        else:
            pieces.append((1, *grids[item][1:]))
            first.append(time)
        previous = item, time
    return patches, pieces, tuple(first), placed


def _clips(lengths: tuple[int, ...], ordinals: np.ndarray, shape: MediaShape) -> tuple[np.ndarray, np.ndarray]:
    """Clips to encode, and which of their features are placed."""
    return _needed(np.array([shape.audio_token_count(length) for length in lengths], int), ordinals)


def _ranges(numbers: np.ndarray) -> Ranges:
    """Ascending numbers as ranges."""
    if not len(numbers):
        return ()
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(numbers, breaks))
