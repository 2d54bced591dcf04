"""Changed encodings of media: smaller pictures, resampled sound, smaller video. Called in the decoder process."""

import io
from fractions import Fraction

import av
from av.video.reformatter import VideoReformatter
from PIL import Image

from megatron_anyexperts.data.media_forms import MediaError, stream_form
from megatron_anyexperts.data.media_image import load_image, over_white
from megatron_anyexperts.data.media_stream import decoded_frames, is_turned, upright_frame

PILLOW_FORMAT = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


def smaller_image(data: bytes, extension: str, width: int, height: int, quality: int, max_pixels: int) -> bytes:
    """A picture, upright, at another size and in another format.

    Raises:
        MediaError: it cannot be decoded.
    """
    image = load_image(data, max_pixels).resize((width, height), Image.Resampling.LANCZOS)
    if extension == "jpg":
        image = over_white(image)
    buffer = io.BytesIO()
    image.save(buffer, PILLOW_FORMAT[extension], quality=quality)
    return buffer.getvalue()


def resampled_audio(data: bytes, rate: int) -> bytes:
    """Sound as mono FLAC of another sample rate."""
    buffer = io.BytesIO()
    with (
        av.open(io.BytesIO(data), format=stream_form(data)[1]) as source,
        av.open(buffer, "w", format="flac", container_options={"fflags": "+bitexact"}) as target,
    ):
        stream = target.add_stream("flac", rate=rate, layout="mono")
        resampler, form = None, None
        for frame in source.decode(audio=0):
            if (now := (frame.sample_rate, frame.layout.name, frame.format.name)) != form:
                _drain(resampler, stream, target)
                resampler, form = av.AudioResampler(format="s16", layout="mono", rate=rate), now
            frame.pts = None
            for resampled in resampler.resample(frame):
                resampled.pts = None
                target.mux(stream.encode(resampled))
        _drain(resampler, stream, target)
        target.mux(stream.encode(None))
    return buffer.getvalue()


def _drain(resampler, stream, target) -> None:
    for resampled in resampler.resample(None) if resampler else ():
        resampled.pts = None
        target.mux(stream.encode(resampled))


def smaller_video(data: bytes, width: int, height: int) -> bytes:
    """A video, upright, as MPEG-4 of another size, without its sound; frames keep their times to the millisecond."""
    buffer, scaler, last = io.BytesIO(), VideoReformatter(), -1
    with av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as target:
        # One thread: the bytes must not depend on the machine.
        stream = target.add_stream("mpeg4", rate=1000, options={"threads": "1", "flags": "+bitexact"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", width * height * 8
        for number, frame in enumerate(decoded_frames(data, "")):
            if number == 0:
                start = frame.time
            if is_turned(frame):
                upright = av.VideoFrame.from_ndarray(upright_frame(frame, scaler), format="rgb24")
            else:
                upright = frame
            smaller = scaler.reformat(upright, width, height, format="yuv420p", threads=1)
            # Some containers do not say the times of their frames.
            at = round(1000 * (frame.time - start)) if None not in (frame.time, start) else 40 * number
            last = max(at, last + 1)
            smaller.pts, smaller.time_base = last, Fraction(1, 1000)
            target.mux(stream.encode(smaller))
        target.mux(stream.encode(None))
    if last < 0:
        raise MediaError("unreadable video", "no frames")
    return buffer.getvalue()
