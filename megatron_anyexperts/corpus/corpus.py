"""The declarative description of a corpus: one YAML file, checked completely before any work."""

import difflib
import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator

from megatron_anyexperts import described
from megatron_anyexperts.corpus.sources import SOURCES
from megatron_anyexperts.corpus.sources.base import Source
from megatron_anyexperts.media import MAX_AUDIO_SECONDS, MAX_PIXELS, MAX_VIDEO_SECONDS


class CorpusError(ValueError):
    """A corpus description, or what it points to, cannot be used; the message says what to change."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(_Section):
    """What a sample may be at most or must be at least; a sample outside is rejected with the figure."""

    max_media_bytes: int = Field(256 * 2**20, gt=0)
    """Bytes of one media file; larger files are not read."""
    max_pixels: int = Field(MAX_PIXELS, gt=0)
    """Pixels of an image or a video frame, checked before decoding."""
    min_side: int = Field(8, gt=0)
    """Shorter side of an image or video frame in pixels."""
    max_aspect: float = Field(50.0, ge=1)
    """Longer over shorter side of an image or video frame."""
    min_seconds: float = Field(0.05, ge=0)
    """Length of audio and video."""
    max_audio_seconds: float = Field(MAX_AUDIO_SECONDS, gt=0)
    """To be raised together with --data-audio-max-seconds of training."""
    max_video_seconds: float = Field(MAX_VIDEO_SECONDS, gt=0)
    """To be raised together with --data-video-max-seconds."""
    min_text_chars: int = Field(1, ge=1)
    """Characters of the text of a sample without surrounding white space."""
    max_text_chars: int = Field(4_000_000, gt=0)
    max_tokens: int | None = Field(None, gt=0)
    """Text tokens of a sample; needs the tokenizer, so it acts when shards are written."""
    max_media: int = Field(256, gt=0)
    """Media of one interleaved document or chat."""


class Tolerance(_Section):
    """Errors that nobody foresaw: each costs one item; more of them than both limits allow end the build.

    Not part of what identifies a build: a build that ended here goes on when the limits are raised.
    """

    unforeseen_items: int = Field(100, ge=0)
    """Items."""
    unforeseen_share: float = Field(0.01, ge=0, le=1)
    """Share of the items read."""


class Shards(_Section):
    """Size of a shard: whichever limit is reached first closes it."""

    max_samples: int = Field(10_000, gt=0)
    max_bytes: int = Field(512 * 2**20, gt=0)


class Dedup(_Section):
    """Removal of repeated samples; the first in plan order stays."""

    exact: bool = True
    """Same text and same media bytes."""
    near_text: float | None = Field(None, gt=0, le=1)
    """Estimated Jaccard similarity of word 3-grams (MinHash) from which a text counts as repeated."""
    near_image: int | None = Field(None, ge=0, le=15)
    """Differing bits of the 64-bit perceptual hash up to which an image counts as repeated."""


class Transform(_Section):
    """Changes of media, none unless asked for."""

    image_max_side: int | None = Field(None, ge=8)
    """Shrink images whose longer side is larger; aspect ratio and transparency stay."""
    image_format: str | None = Field(None, pattern="^(png|jpg|webp)$")
    """Format of images that are shrunk, or of all images when `image_max_side` is not given."""
    image_quality: int = Field(90, ge=1, le=100)
    audio_sample_rate: int | None = Field(None, ge=8000, le=192_000)
    """Resample audio to this rate, mono, stored as lossless FLAC."""
    video_max_side: int | None = Field(None, ge=16)
    """Re-encode videos (MPEG-4) whose longer side is larger, without their sound."""


class TokenizerSpec(_Section):
    """A Hugging Face tokenizer directory, or the training of a byte-level BPE on the corpus."""

    path: Path | None = None
    vocab_size: int = Field(32_000, ge=300)
    train_bytes: int = Field(64 * 2**20, gt=0)
    """Text to train on, drawn evenly from the corpus' training split."""


class Estimate(_Section):
    """How media are counted in tokens in the manifest; training decides for itself."""

    patch_size: int = Field(14, gt=0)
    spatial_merge: int = Field(2, gt=0)
    audio_stride: int = Field(8, gt=0)
    image_max_tokens: int = Field(1024, gt=0)
    video_fps: float = Field(1.0, gt=0)
    video_max_frames: int = Field(32, gt=0)


class Corpus(_Section):
    """A corpus: its sources and what is done with them."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
    seed: int = 0
    """Order of the samples."""
    validation_fraction: float = Field(0.01, ge=0, lt=1)
    """Share of the samples held out, chosen by content hash: a sample never changes sides when data is added."""
    chunk_items: int = Field(512, gt=0)
    """Files, or rows of a table, in one unit of work."""
    chunk_bytes: int = Field(16 * 2**20, gt=0)
    """Bytes of a line-based file in one unit of work."""
    sources: list[SerializeAsAny[Source]] = Field(min_length=1)
    limits: Limits = Limits()
    tolerance: Tolerance = Tolerance()
    shards: Shards = Shards()
    dedup: Dedup = Dedup()
    transform: Transform = Transform()
    tokenizer: TokenizerSpec = TokenizerSpec()
    estimate: Estimate = Estimate()

    @field_validator("sources", mode="before")
    @classmethod
    def _pick_source_classes(cls, value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError("must be a list of sources, each with a type and a path")
        return [_build_source(index, item) for index, item in enumerate(value)]


def _build_source(index: int, item: Any) -> Source:
    if isinstance(item, Source):
        return item
    if not isinstance(item, dict):
        raise ValueError(f"source {index} must be a mapping with a type and a path")
    options = dict(item)
    name = options.pop("type", None)
    if name not in SOURCES:
        raise ValueError(f"source {index} has type {name!r};{_nearest(str(name), SOURCES)} types: {sorted(SOURCES)}")
    try:
        return SOURCES[name](**options)
    except ValidationError as error:
        raise ValueError(f"source {index} ({name}): {_explain(error, SOURCES[name])}") from None


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" did you mean {close[0]!r}?" if close else ""


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    messages = []
    for problem in error.errors():
        location = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            owner = model
            for part in problem["loc"][:-1]:
                owner = owner.model_fields[str(part)].annotation
            hint = _nearest(str(problem["loc"][-1]), owner.model_fields)
            messages.append(f"unknown key {location!r};{hint} keys: {sorted(owner.model_fields)}")
        elif problem["type"] == "value_error":
            messages.append(f"{location}: {problem['ctx']['error']}")
        else:
            messages.append(f"{location}={problem['input']!r}: {problem['msg']}")
    return "; ".join(messages)


def parse_corpus(document: Any) -> Corpus:
    """Check a corpus description that was read from YAML or JSON.

    Raises:
        CorpusError: an unknown key (with the nearest known one), a missing or impossible value.
    """
    if not isinstance(document, dict):
        raise CorpusError("a corpus description is a mapping with name and sources")
    try:
        return Corpus(**document)
    except ValidationError as error:
        raise CorpusError(_explain(error, Corpus)) from None
    except TypeError as error:
        raise CorpusError(f"keys must be words: {error}") from None


def load_corpus(path: Path, root: Path | None = None) -> Corpus:
    """Read a corpus description; its relative paths start at `root`, by default the file's own folder.

    Raises:
        CorpusError: the file is missing, is not YAML, or describes no usable corpus.
    """
    try:
        document = described.load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CorpusError(f"{path}: cannot read it: {error}") from None
    try:
        corpus = parse_corpus(document)
    except CorpusError as error:
        raise CorpusError(f"{path}: {error}") from None
    root = (root or path.parent).resolve()
    names = [source.label for source in corpus.sources]
    if len(set(names)) < len(names):
        raise CorpusError(f"{path}: two sources share a name: {sorted(names)}; give each its own `name`")
    tokenizer = corpus.tokenizer
    if tokenizer.path is not None:
        tokenizer = tokenizer.model_copy(update={"path": root / tokenizer.path})
        if not tokenizer.path.is_dir():
            raise CorpusError(f"{path}: tokenizer.path={tokenizer.path} is no directory")
    for source in corpus.sources:
        _check_links(path, root, source)
    sources = [source.located_at(root) for source in corpus.sources]
    return corpus.model_copy(update={"sources": sources, "tokenizer": tokenizer})


def _check_links(path: Path, root: Path, source: Source) -> None:
    """Hold what a description names below its root against links that lead elsewhere.

    Raises:
        CorpusError: one does, and `follow_links` is not set.
    """
    for named in (source.path, getattr(source, "media_root", None)):
        if named is None or source.follow_links:
            continue
        written = Path(os.path.normpath(root / named))
        if written.is_relative_to(root) and not written.resolve().is_relative_to(root):
            raise CorpusError(
                f"{path}: source {source.label!r}: {named} is a link that leads out of {root}, to {written.resolve()}; "
                "name that path itself, or set `follow_links: true` for the source"
            )
