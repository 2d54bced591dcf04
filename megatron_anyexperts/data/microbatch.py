"""The microbatch: its fields, and how it is packed, handed over, moved and shared as one buffer."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_anyexperts.host_sizes import HostSizes
from megatron_anyexperts.media import PAD

ALIGNMENT = 16
"""Bytes; at least the largest item of a field."""

MOST_AXES = 2

_HEADER = 2048
"""Numbers of the first message of `broadcast`: room for the sizes of any ordinary row."""


@dataclass(frozen=True)
class Field:
    """One tensor of a microbatch."""

    dtype: torch.dtype
    axes: str
    """B rows of S positions; P patches of N images or videos in order; F log-mel frames of M clips in order."""
    meaning: str

    @property
    def numpy(self) -> np.dtype:
        """The same type on the host."""
        return np.dtype(str(self.dtype).removeprefix("torch."))

    @property
    def ragged(self) -> bool:
        """Whether rows have it in different lengths: they are joined along the first axis instead of stacked."""
        return not self.axes.startswith("B")


FIELDS: dict[str, Field] = {
    "tokens": Field(torch.int64, "B S", "token ids"),
    "labels": Field(torch.int64, "B S", "shifted: the label of a position is the next token of its document"),
    "loss_mask": Field(torch.float32, "B S", "1 where the label is a target"),
    "position_ids": Field(torch.int64, "B S", "restart in each document"),
    "segment_ids": Field(torch.int32, "B S", "number of the document within the row from 1, 0 at padding"),
    "token_modality": Field(torch.int8, "B S", "media.MODALITY_CODES, -1 at padding"),
    "sample_modality": Field(torch.int8, "B S", "kind of the sample, -1 at padding"),
    "image_patches": Field(torch.float32, "P 3*patch_size**2", "normalised pixels"),
    "image_grids": Field(torch.int32, "N 3", "frames, height and width in patches"),
    "audio_features": Field(torch.float32, "F n_mels", "log-mel"),
    "audio_lengths": Field(torch.int32, "M", "frames of a clip"),
}
"""In the order in which they lie in the buffer."""

PADDING = {"token_modality": PAD, "sample_modality": PAD}
"""What a place without a token holds where that is not 0; `tokens` and `labels` may hold any id there."""

TRAINING_INPUTS = tuple(name for name in FIELDS if name != "sample_modality")
"""What `MultimodalModel` takes to return losses."""

LOGIT_INPUTS = tuple(name for name in TRAINING_INPUTS if name not in ("labels", "loss_mask", "segment_ids"))
"""What it takes to return logits of a row that is one document."""

Shapes = tuple[tuple[int, ...], ...]


class Microbatch(Mapping[str, torch.Tensor]):
    """The tensors of `FIELDS` by name, as views of one buffer.

    Args:
        buffer: uint8 [bytes]; each field starts at a multiple of `ALIGNMENT`.
        shapes: of the fields, in order.
        sample_keys: keys of the samples of each of B rows.
        sizes: what the host needs to know of the tensors.
    """

    def __init__(self, buffer: torch.Tensor, shapes: Shapes, sample_keys: list[list[str]], sizes: HostSizes) -> None:
        self.buffer, self.shapes, self.sample_keys, self.sizes = buffer, shapes, sample_keys, sizes
        self._spans = dict(zip(FIELDS, _spans(shapes), strict=True))

    def __getitem__(self, name: str) -> torch.Tensor:
        start, stop, shape = self._spans[name]
        return self.buffer[start:stop].view(FIELDS[name].dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(FIELDS)

    def __len__(self) -> int:
        return len(FIELDS)

    def select(self, names: tuple[str, ...]) -> dict[str, torch.Tensor | HostSizes]:
        """Some of the tensors, and `sizes`: arguments of `MultimodalModel`."""
        return {name: self[name] for name in names} | {"sizes": self.sizes}

    def to(self, device: torch.device) -> "Microbatch":
        """On another device, by one copy, which does not wait if the buffer is pinned."""
        return Microbatch(self.buffer.to(device, non_blocking=True), self.shapes, self.sample_keys, self.sizes)


def _spans(shapes: Shapes) -> list[tuple[int, int, tuple[int, ...]]]:
    """First byte, end and shape of each field."""
    spans, stop = [], 0
    for field, shape in zip(FIELDS.values(), shapes, strict=True):
        start = -(-stop // ALIGNMENT) * ALIGNMENT
        stop = start + math.prod(shape) * field.dtype.itemsize
        spans.append((start, stop, shape))
    return spans


def pack(rows: list[dict[str, np.ndarray]], keys: list[list[str]]) -> dict[str, Any]:
    """Join B rows; a worker process hands over one shared-memory segment.

    Args:
        rows: arrays of `FIELDS`, [S] where those are [B, S].
        keys: keys of the samples of each row.

    Returns:
        The arguments of `Microbatch`.
    """
    arrays = {
        name: (np.concatenate if field.ragged else np.stack)([row[name] for row in rows])
        for name, field in FIELDS.items()
    }
    shapes = tuple(array.shape for array in arrays.values())
    spans = _spans(shapes)
    buffer = np.zeros(spans[-1][1], np.uint8)
    for (name, array), (start, stop, _) in zip(arrays.items(), spans, strict=True):
        assert array.dtype == FIELDS[name].numpy, f"{name} is {array.dtype}"
        buffer[start:stop] = array.reshape(-1).view(np.uint8)
    counted = ("segment_ids", "token_modality", "image_grids", "audio_lengths")
    sizes = HostSizes.of(*(arrays[name] for name in counted))
    return {"buffer": torch.from_numpy(buffer), "shapes": shapes, "sample_keys": keys, "sizes": sizes}


def collate(rows: list[dict[str, np.ndarray]], keys: list[list[str]]) -> Microbatch:
    """The microbatch of B rows; see `pack`."""
    return Microbatch(**pack(rows, keys))


def broadcast(
    batch: Microbatch | None, device: torch.device, source: int, group: torch.distributed.ProcessGroup
) -> Microbatch:
    """Send a microbatch from one rank to its group: a message of shapes and sizes, then one of all tensors.

    A receiver waits for the first one only: it has the shapes of the second.

    Args:
        batch: on `device` at the source; None on the other ranks.
        device: of this rank.
        source: global rank.
        group: all of its ranks call this.

    Returns:
        The microbatch; without sample keys where it was received.
    """
    numbers = header_of(batch) if batch else []
    header = _padded(numbers, _HEADER).to(device, non_blocking=True)
    torch.distributed.broadcast(header, source, group=group)
    if batch is None:
        numbers = header.tolist()
    if (length := numbers[0]) > _HEADER:
        header = _padded(numbers, length).to(device, non_blocking=True)
        torch.distributed.broadcast(header, source, group=group)
        numbers = header.tolist() if batch is None else numbers
    if batch is None:
        batch = empty_microbatch(numbers, device)
    torch.distributed.broadcast(batch.buffer, source, group=group)
    return batch


def header_of(batch: Microbatch) -> list[int]:
    """Its own length, the shapes (-1 where a field has fewer axes), the sizes."""
    shapes = [length for shape in batch.shapes for length in (*shape, *[-1] * (MOST_AXES - len(shape)))]
    numbers = [*shapes, *batch.sizes.to_list()]
    return [1 + len(numbers), *numbers]


def _padded(numbers: list[int], length: int) -> torch.Tensor:
    """int64 [length], in pinned memory where there is a GPU."""
    padded = torch.zeros(length, dtype=torch.int64, pin_memory=torch.cuda.is_available())
    taken = numbers[:length]
    padded[: len(taken)] = torch.tensor(taken, dtype=torch.int64)
    return padded


def empty_microbatch(numbers: list[int], device: torch.device) -> Microbatch:
    """An empty microbatch of the shapes and sizes of a header."""
    end = 1 + len(FIELDS) * MOST_AXES
    axes = [numbers[start : start + MOST_AXES] for start in range(1, end, MOST_AXES)]
    shapes = tuple(tuple(length for length in shape if length >= 0) for shape in axes)
    buffer = torch.empty(_spans(shapes)[-1][1], dtype=torch.uint8, device=device)
    return Microbatch(buffer, shapes, [], HostSizes.from_list(numbers[end:]))
