"""Plans documents as token sequences with placeholders, and decodes their media once their place is known."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megatron_anyexperts.data import media_decode, media_image, media_speech, media_stream
from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.cookers import sample_modality
from megatron_anyexperts.data.decoder_process import DecoderDied, DecoderProcess
from megatron_anyexperts.data.faults import Quarantine
from megatron_anyexperts.data.log_mel import log_mel
from megatron_anyexperts.data.media_forms import MediaError
from megatron_anyexperts.data.samples import Document, Marker, Media, Planned, PlannedFrames, SampleError, Text
from megatron_anyexperts.data.vocabulary import Vocabulary
from megatron_anyexperts.media import MODALITY_CODES, MediaShape

_WAY_OUT = {
    ("too long", media_speech.decode_speech): "; raise data_audio_max_seconds, or cut it",
    ("too long", media_stream.probe_video): "; raise data_video_max_seconds, or cut it",
    ("too many pixels", media_image.image_size): "; raise data_image_max_pixels, or shrink it",
    ("too many pixels", media_stream.probe_video): "; raise data_image_max_pixels, or shrink it",
}


class _Tokens:
    """Token ids with their flags, grown part by part."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.ids: list[int] = []
        self.target: list[bool] = []
        self.modality: list[int] = []

    def text(self, text: str, target: bool) -> None:
        self._add(self._vocabulary.encode(text), target, 0)

    def marker(self, token: str, target: bool = False) -> None:
        self._add([self._vocabulary.special[token]], target, 0)

    def placeholders(self, modality: str, count: int) -> None:
        self._add([self._vocabulary.special[f"<|{modality}|>"]] * count, False, MODALITY_CODES[modality])

    def _add(self, ids: list[int], target: bool, modality: int) -> None:
        self.ids += ids
        self.target += [target] * len(ids)
        self.modality += [modality] * len(ids)


class DocumentEncoder:
    """Turns documents into planned samples and planned samples into encoded ones.

    Args:
        config: limits and budgets.
        shape: media geometry, shared with the encoders.
        vocabulary: the tokenizer.
        seq_length: positions of a row (S).
        quarantine: samples that killed a decoder.

    Raises:
        ValueError: an image or video of the largest permitted size could never fit into a row.
    """

    def __init__(
        self,
        config: DataConfig,
        shape: MediaShape,
        vocabulary: Vocabulary,
        seq_length: int,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.config, self.shape, self.vocabulary = config, shape, vocabulary
        self._decoder, self._quarantine = DecoderProcess(), quarantine or Quarantine()
        patches = config.data_row_patches or seq_length * shape.spatial_merge**2
        frames = config.data_row_audio_frames or seq_length * shape.audio_stride
        self.limits = (seq_length, patches, frames)
        for name in ("data_image_max_patches", "data_video_max_patches"):
            budget = min(patches, (seq_length - 2) * shape.spatial_merge**2)
            if getattr(config, name) > budget:
                raise ValueError(
                    f"{name}={getattr(config, name)} cannot fit a row of {seq_length} tokens and {patches} patches; "
                    f"set it to at most {budget}, or raise --seq-length or data_row_patches"
                )

    def plan(self, document: Document) -> Iterator[Planned]:
        """Tokenize a document and reserve room for its media.

        Text longer than a row becomes several samples that cut it without losing or repeating a target; their keys
        end in ``#part/parts``.

        Raises:
            SampleError: a medium cannot be used, or a document with media or turns is longer than a row.
        """
        key = f"{document.kind}/{document.__key__}"
        tokens = _Tokens(self.vocabulary)
        frames: list[PlannedFrames] = []
        clips: list[np.ndarray] = []
        for part in document.parts:
            match part:
                case Text(text, target):
                    tokens.text(text, target)
                case Marker(token, target):
                    tokens.marker(token, target)
                case Media("image"):
                    frames.append(self._plan_image(key, part, tokens))
                case Media("video"):
                    frames.append(self._plan_video(key, part, tokens))
                case Media("audio"):
                    clips.append(self._plan_audio(key, part, tokens))
        tokens.marker("<|endoftext|>", target=True)
        whole = Planned(
            __key__=key,
            __restore_key__=document.__restore_key__,
            __subflavors__=document.__subflavors__,
            __sources__=document.__sources__,
            sample_modality=sample_modality(document.parts),
            tokens=np.array(tokens.ids, np.int64),
            target=np.array(tokens.target, bool),
            modality=np.array(tokens.modality, np.int8),
            frames=frames,
            grids=[planned.grid for planned in frames],
            clips=clips,
        )
        if not whole.target[1:].any():
            raise SampleError("nothing to train on: the document has no target token")
        yield from self._fit(whole, splittable=document.kind == "text")

    def decode(self, planned: Planned) -> Planned:
        """Decode the images and videos of a planned sample.

        Raises:
            SampleError: a medium is damaged.
        """
        if not planned.frames:
            return planned
        decoded = [self._decode(planned.__key__, frames) for frames in planned.frames]
        return dataclasses.replace(planned, frames=decoded)

    def _call(self, key: str, stage: str, function: Callable, *arguments) -> Any:
        """Decode in the child process what belongs to the sample `key`."""
        self._quarantine.check(key, stage)
        try:
            if function is media_image.image_size and not media_image.header_needs_decoder(arguments[0]):
                return function(*arguments)
            return self._decoder.run(function, *arguments)
        except DecoderDied as error:
            self._quarantine.add(key, stage, str(error))
            raise SampleError(f"{error}; quarantined") from error
        except MediaError as error:
            raise SampleError(f"{error}{_WAY_OUT.get((error.reason, function), '')}") from error

    def _fit(self, whole: Planned, splittable: bool) -> Iterator[Planned]:
        seq_length = self.limits[0]
        if splittable and whole.size[0] > seq_length:
            starts = range(0, whole.size[0], seq_length)
            for index, start in enumerate(starts):
                cut = slice(start, start + seq_length + 1)
                yield dataclasses.replace(
                    whole,
                    __key__=f"{whole.__key__}#{index}/{len(starts)}",
                    tokens=whole.tokens[cut],
                    target=whole.target[cut],
                    modality=whole.modality[cut],
                )
            return
        for what, size, limit in zip(("tokens", "patches", "audio frames"), whole.size, self.limits, strict=True):
            if size > limit:
                raise SampleError(f"{size} {what} exceed the {limit} of a row")
        yield whole

    def _plan_image(self, key: str, media: Media, tokens: _Tokens) -> PlannedFrames:
        config, shape = self.config, self.shape
        height, width, _ = self._call(key, "plan", media_image.image_size, media.data, config.data_image_max_pixels)
        size = media_decode.fit_grid(
            height, width, shape.pixel_multiple, shape.patch_size, config.data_image_min_patches,
            config.data_image_max_patches,
        )  # fmt: skip
        grid = shape.image_grid(*size)
        tokens.marker("<|image_start|>")
        tokens.placeholders("image", shape.image_token_count(grid))
        tokens.marker("<|image_end|>")
        return PlannedFrames(media, grid, None)

    def _plan_video(self, key: str, media: Media, tokens: _Tokens) -> PlannedFrames:
        config, shape = self.config, self.shape
        limits = config.data_video_max_seconds, config.data_image_max_pixels
        times = self._call(key, "plan", media_stream.probe_video, media.data, media.extension, *limits)
        frames = media_decode.sample_frames(times.seconds, config.data_video_fps, config.data_video_max_frames)
        per_frame = config.data_video_max_patches // len(frames)
        size = media_decode.fit_grid(
            times.height, times.width, shape.pixel_multiple, shape.patch_size,
            min(config.data_image_min_patches, per_frame), min(config.data_image_max_patches, per_frame),
        )  # fmt: skip
        grid = shape.image_grid(*size, frames=len(frames))
        tokens.marker("<|video_start|>")
        for index in frames:  # each frame follows its time in seconds, as text
            tokens.text(f"{times.seconds[index]:.1f}s", target=False)
            tokens.placeholders("video", shape.image_token_count((1, *grid[1:])))
        tokens.marker("<|video_end|>")
        ticks = None if times.ticks is None else tuple(times.ticks[index] for index in frames)
        return PlannedFrames(media, grid, frames, ticks)

    def _plan_audio(self, key: str, media: Media, tokens: _Tokens) -> np.ndarray:
        # Containers do not promise an exact length, and features are small: decode now.
        limit = self.config.data_audio_max_seconds
        samples = self._call(key, "plan", media_speech.decode_speech, media.data, media.extension, limit)
        clip = log_mel(samples, self.shape.n_mels)
        tokens.marker("<|audio_start|>")
        tokens.placeholders("audio", self.shape.audio_token_count(len(clip)))
        tokens.marker("<|audio_end|>")
        return clip

    def _decode(self, key: str, planned: PlannedFrames) -> np.ndarray:
        patch = self.shape.patch_size
        _, rows, columns = planned.grid
        size = rows * patch, columns * patch
        media = planned.media
        if planned.frames is None:
            limit = self.config.data_image_max_pixels
            pictures = [self._call(key, "decode", media_image.decode_image, media.data, *size, limit)]
        else:
            call = media_stream.decode_frames, media.data, media.extension, planned.ticks, planned.frames, *size
            pictures = self._call(key, "decode", *call)
        return np.concatenate([media_decode.patchify(picture, patch) for picture in pictures])
