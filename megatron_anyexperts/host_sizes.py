"""What the host needs to know of a microbatch: counted where it is made, so that nobody waits for a GPU to ask it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import batched, pairwise

import numpy as np

from megatron_anyexperts.media import AUDIO, VISION_CODES

Grid = tuple[int, int, int]
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class HostSizes:
    """Whole numbers by which shapes, splits and borders are set.

    Attributes:
        documents: of each row, the lengths of its documents in order, padding as one more. Of a row that is cut over
            context-parallel ranks those of the whole row, see `row_cut`.
        grids: frames, height and width in patches of each image or video.
        clips: frames of each audio clip.
        placeholders: tokens that stand for vision and for audio features.
        first_frames: which frame of its video each grid begins with; empty where all begin with the first.
        taken: which of the features of vision and of audio stand for tokens, as ranges; None: all.
    """

    documents: tuple[tuple[int, ...], ...] = ()
    grids: tuple[Grid, ...] = ()
    clips: tuple[int, ...] = ()
    placeholders: tuple[int, int] = (0, 0)
    first_frames: tuple[int, ...] = ()
    taken: tuple[Ranges, Ranges] | None = None

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
        lists = [*self.documents, *self.grids, self.clips, self.placeholders, self.first_frames]
        if self.taken is not None:
            lists += [[place for pair in ranges for place in pair] for ranges in self.taken]
        counts = [len(self.documents), len(self.grids), int(self.taken is not None)]
        return [*counts, *(number for each in lists for number in (len(each), *each))]

    @classmethod
    def from_list(cls, numbers: list[int]) -> HostSizes:
        """The sizes whose `to_list` this is; what follows it is not read."""
        rows, images, cut = numbers[:3]
        lists, start = [], 3
        for _ in range(rows + images + 3 + 2 * cut):
            end = start + 1 + numbers[start]
            lists.append(tuple(numbers[start + 1 : end]))
            start = end
        clips, placeholders, first_frames, *flat = lists[rows + images :]
        taken = tuple(tuple(batched(each, 2)) for each in flat) if cut else None
        return cls(tuple(lists[:rows]), tuple(lists[rows : rows + images]), clips, placeholders, first_frames, taken)


def _runs(row: np.ndarray) -> tuple[int, ...]:
    """Lengths of the runs of equal numbers."""
    borders = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
    return tuple(stop - start for start, stop in pairwise(borders))
