"""Changes of media that a corpus asks for: smaller images, resampled sound, smaller video."""

import io
from dataclasses import replace

import av
from PIL import Image

from megatron_anyexperts.data.build.corpus import Transform
from megatron_anyexperts.data.build.probe import Facts, container_of
from megatron_anyexperts.data.build.sample import Media, Rejected, Sample

PILLOW_FORMAT = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


def transform(sample: Sample, facts: list[Facts], options: Transform) -> tuple[Sample, list[Facts]]:
    """A sample with its media changed as asked; media that need no change keep their bytes.

    Raises:
        Rejected: a medium cannot be decoded or encoded.
    """
    try:
        changed = [_transform(media, fact, options) for media, fact in zip(sample.media, facts, strict=True)]
    except Exception as error:  # codecs raise whatever a damaged file provokes in them
        raise Rejected("cannot be converted", f"{type(error).__name__}: {error}"[:200]) from None
    media = [Media(fact.type, data) for data, fact in changed]
    return replace(sample, media=media), [fact for _, fact in changed]


def _transform(media: Media, fact: Facts, options: Transform) -> tuple[bytes, Facts]:
    longer = max(fact.width, fact.height)
    if fact.type == "image":
        too_large = options.image_max_side is not None and longer > options.image_max_side
        if too_large or (options.image_max_side is None and options.image_format not in (None, fact.extension)):
            return _image(media.data, fact, options)
    elif fact.type == "audio" and options.audio_sample_rate is not None:
        return _audio(media.data, fact, options.audio_sample_rate)
    elif fact.type == "video" and options.video_max_side is not None and longer > options.video_max_side:
        return _video(media.data, fact, options.video_max_side)
    return media.data, fact


def _fitted(fact: Facts, max_side: int | None, multiple: int = 1) -> tuple[int, int]:
    scale = 1.0 if max_side is None else min(1.0, max_side / max(fact.width, fact.height))
    width, height = (max(1, round(side * scale / multiple)) * multiple for side in (fact.width, fact.height))
    return width, height


def _image(data: bytes, fact: Facts, options: Transform) -> tuple[bytes, Facts]:
    with Image.open(io.BytesIO(data)) as image:
        transparent = "A" in image.getbands() or "transparency" in image.info
        image = image.convert("RGBA" if transparent else "RGB")
    extension = options.image_format or (fact.extension if fact.extension in PILLOW_FORMAT else "png")
    width, height = _fitted(fact, options.image_max_side)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    if extension == "jpg" and transparent:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, PILLOW_FORMAT[extension], quality=options.image_quality)
    return buffer.getvalue(), replace(fact, extension=extension, width=width, height=height)


def _audio(data: bytes, fact: Facts, sample_rate: int) -> tuple[bytes, Facts]:
    buffer = io.BytesIO()
    resampler = av.AudioResampler(format="s16", layout="mono", rate=sample_rate)
    with (
        av.open(io.BytesIO(data), format=container_of(data)[1]) as source,
        av.open(buffer, "w", format="flac", container_options={"fflags": "+bitexact"}) as target,
    ):
        stream = target.add_stream("flac", rate=sample_rate, layout="mono")
        for frame in source.decode(audio=0):
            for resampled in resampler.resample(frame):
                target.mux(stream.encode(resampled))
        for resampled in resampler.resample(None):
            target.mux(stream.encode(resampled))
        target.mux(stream.encode(None))
    return buffer.getvalue(), replace(fact, extension="flac")


def _video(data: bytes, fact: Facts, max_side: int) -> tuple[bytes, Facts]:
    width, height = _fitted(fact, max_side, multiple=2)
    buffer = io.BytesIO()
    with (
        av.open(io.BytesIO(data), format=container_of(data)[1]) as source,
        av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as target,
    ):
        rate = source.streams.video[0].average_rate or 25
        # One thread: the bytes must not depend on the machine.
        stream = target.add_stream("mpeg4", rate=rate, options={"threads": "1", "flags": "+bitexact"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", width * height * 8
        for number, frame in enumerate(source.decode(video=0)):
            smaller = frame.reformat(width, height, format="yuv420p")
            smaller.pts, smaller.time_base = number, 1 / rate
            target.mux(stream.encode(smaller))
        target.mux(stream.encode(None))
    return buffer.getvalue(), replace(fact, extension="mp4", width=width, height=height)
