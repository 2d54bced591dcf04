"""What the host needs to know of a microbatch: counted where it is made, so that nobody waits for a GPU to ask it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_anyexperts.media import AUDIO, VISION_CODES

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class HostSizes:
    """Whole numbers by which shapes, splits and borders are set.

    Attributes:
        documents: of each row, the lengths of its documents in order, padding as one more.
        grids: frames, height and width in patches of each image or video.
        clips: frames of each audio clip.
        placeholders: tokens that stand for vision and for audio features.
    """

    documents: tuple[tuple[int, ...], ...] = ()
    grids: tuple[Grid, ...] = ()
    clips: tuple[int, ...] = ()
    placeholders: tuple[int, int] = (0, 0)

    @classmethod
    def of(
        cls,
        segment_ids: np.ndarray | None = None,
        token_modality: np.ndarray | None = None,
        image_grids: np.ndarray | None = None,
        audio_lengths: np.ndarray | None = None,
    ) -> HostSizes:
        """Count arrays of `microbatch.FIELDS`; what is None has none."""
        kinds = np.zeros(0) if token_modality is None else token_modality
        return cls(
            () if segment_ids is None else tuple(_runs(row) for row in segment_ids),
            () if image_grids is None else tuple(tuple(grid) for grid in image_grids.tolist()),
            () if audio_lengths is None else tuple(audio_lengths.tolist()),
            (int(np.isin(kinds, VISION_CODES).sum()), int((kinds == AUDIO).sum())),
        )

    def to_list(self) -> list[int]:
        """As one list of numbers, for a message."""
        counts = [len(self.documents), len(self.grids), len(self.clips), *self.placeholders]
        rows = [number for row in self.documents for number in (len(row), *row)]
        return [*counts, *rows, *(number for grid in self.grids for number in grid), *self.clips]

    @classmethod
    def from_list(cls, numbers: list[int]) -> HostSizes:
        """The sizes whose `to_list` this is; what follows it is not read."""
        rows, images, clips, vision, audio = numbers[:5]
        documents, start = [], 5
        for _ in range(rows):
            end = start + 1 + numbers[start]
            documents.append(tuple(numbers[start + 1 : end]))
            start = end
        middle = start + 3 * images
        grids = tuple(tuple(numbers[place : place + 3]) for place in range(start, middle, 3))
        return cls(tuple(documents), grids, tuple(numbers[middle : middle + clips]), (vision, audio))


def _runs(row: np.ndarray) -> tuple[int, ...]:
    """Lengths of the runs of equal numbers."""
    borders = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
    return tuple(stop - start for start, stop in pairwise(borders))
