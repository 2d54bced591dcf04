"""Changes of media that a corpus asks for: smaller images, resampled sound, smaller video."""

from dataclasses import replace

from megatron_anyexperts.corpus.convert import PILLOW_FORMAT, resampled_audio, smaller_image, smaller_video
from megatron_anyexperts.corpus.corpus import Limits, Transform
from megatron_anyexperts.corpus.facts import Facts
from megatron_anyexperts.corpus.probe import in_decoder, probe
from megatron_anyexperts.corpus.sample import Media, Rejected, Sample


def transform(
    sample: Sample, facts: list[Facts], options: Transform, limits: Limits
) -> tuple[Sample, list[Facts]]:
    """A sample with its media changed as asked; media that need no change keep their bytes.

    Raises:
        Rejected: a medium cannot be decoded or encoded, or its new encoding is outside the limits.
    """
    media, known = [], []
    for medium, fact in zip(sample.media, facts, strict=True):
        changed = _transform(medium, fact, options, limits)
        if changed is not medium:
            fact = probe(changed, limits)
        media.append(changed)
        known.append(fact)
    return replace(sample, media=media), known


def _transform(media: Media, fact: Facts, options: Transform, limits: Limits) -> Media:
    longer = max(fact.width, fact.height)
    if fact.type == "image":
        too_large = options.image_max_side is not None and longer > options.image_max_side
        if too_large or (options.image_max_side is None and options.image_format not in (None, fact.extension)):
            extension = options.image_format or (fact.extension if fact.extension in PILLOW_FORMAT else "png")
            size = _fitted(fact, options.image_max_side)
            return _converted(media, smaller_image, extension, *size, options.image_quality, limits.max_pixels)
    elif fact.type == "audio" and options.audio_sample_rate is not None:
        return _converted(media, resampled_audio, options.audio_sample_rate)
    elif fact.type == "video" and options.video_max_side is not None and longer > options.video_max_side:
        return _converted(media, smaller_video, *_fitted(fact, options.video_max_side, multiple=2))
    return media


def _converted(media: Media, convert, *arguments) -> Media:
    try:
        return Media(media.type, in_decoder(convert, media.data, *arguments))
    except Rejected:
        raise
    except Exception as error:  # codecs raise whatever a damaged file provokes in them
        raise Rejected("cannot be converted", f"{type(error).__name__}: {error}"[:200]) from None


def _fitted(fact: Facts, max_side: int | None, multiple: int = 1) -> tuple[int, int]:
    scale = 1.0 if max_side is None else min(1.0, max_side / max(fact.width, fact.height))
    width, height = (max(1, round(side * scale / multiple)) * multiple for side in (fact.width, fact.height))
    return width, height
