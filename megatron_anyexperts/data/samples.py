"""What a sample is at each stage of the feed: cooked document, planned sample, encoded sample."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from megatron.energon import Sample
from megatron.energon.edataclass import edataclass


class SampleError(ValueError):
    """One sample cannot be used; the message is the reason that is logged and counted."""


@dataclass(frozen=True)
class Text:
    """A stretch of text; `target` says whether the model is trained to produce it."""

    text: str
    target: bool


@dataclass(frozen=True)
class Marker:
    """One special token of the vocabulary, by name."""

    token: str
    target: bool = False


@dataclass(frozen=True)
class Media:
    """One image, audio clip or video in its original encoding; `extension` names the format, as in ``mp4``."""

    modality: str
    data: bytes
    extension: str


@edataclass
class Document(Sample):
    """A cooked sample: text and media in reading order."""

    kind: str
    parts: list


@dataclass(frozen=True)
class PlannedFrames:
    """An image or a video whose size in the row is known but which is not decoded yet.

    Attributes:
        media: the encoded file.
        grid: (t, h, w) in patches.
        frames: indices of the video frames to decode; None for an image.
        ticks: their presentation times, where the container says them.
    """

    media: Media
    grid: tuple[int, int, int]
    frames: tuple[int, ...] | None
    ticks: tuple[int, ...] | None = None


@edataclass
class Planned(Sample):
    """A tokenized sample of L + 1 tokens: L inputs and, shifted by one, L labels.

    Attributes:
        sample_modality: code of the kind of sample.
        tokens: int64 [L + 1].
        target: bool [L + 1]; True where the token is a training target.
        modality: int8 [L + 1]; a media code at placeholders, 0 elsewhere.
        frames: images and videos in order of appearance: `PlannedFrames`, after decoding
            float32 arrays [patches, 3 * p * p].
        grids: (t, h, w) in patches of each entry of `frames`.
        clips: float32 log-mel arrays [frames, n_mels] in order of appearance.
    """

    sample_modality: int
    tokens: np.ndarray
    target: np.ndarray
    modality: np.ndarray
    frames: list[Any]
    grids: list[tuple[int, int, int]]
    clips: list[np.ndarray]

    @property
    def size(self) -> tuple[int, int, int]:
        """(positions, patches, audio frames) that the sample takes from a row."""
        return (
            len(self.tokens) - 1,
            sum(t * h * w for t, h, w in self.grids),
            sum(len(clip) for clip in self.clips),
        )


@edataclass
class Row(Sample):
    """A packed row of S positions; the fields are those of the microbatch without the batch dimension."""

    arrays: dict[str, np.ndarray]
    keys: list[str]
