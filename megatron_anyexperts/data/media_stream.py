"""Reads sound and video: the presentation as a player shows it, with limits that act before memory is spent."""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image

from megatron_anyexperts.data.media_forms import MediaError, brief, stream_form

av.logging.set_level(av.logging.PANIC)

MAX_SAMPLE_RATE = 768_000
"""Above, resampling takes memory for what can only be a damaged number."""

_FULL_SCALE = {"u8": 2.0**7, "s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63}


@dataclass(frozen=True)
class Sound:
    """A stretch of sound of one sample rate."""

    samples: np.ndarray
    """float32 [n], mono, full scale 1."""
    rate: int


@dataclass(frozen=True)
class FrameTimes:
    """The frames of a video in the order in which they are shown."""

    height: int
    width: int
    seconds: list[float]
    """Presentation times, ascending from 0."""
    ticks: list[int] | None
    """The same in the units of the container; None where it does not say them."""
    duration: float
    """Seconds from the first frame to the end of the last one."""


def _container(data: bytes, extension: str) -> av.container.InputContainer:
    return av.open(io.BytesIO(data), format=stream_form(data, extension)[1])


def _stream(container: av.container.InputContainer, kind: str):
    # Cover pictures count as video streams.
    streams = [s for s in getattr(container.streams, kind) if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise MediaError(f"no {kind} in the file", f"it holds {[stream.type for stream in container.streams]}")
    return streams[0]


def _named(kind: str, error: Exception) -> MediaError:
    return error if isinstance(error, MediaError) else MediaError(f"unreadable {kind}", brief(error))


def decode_sound(data: bytes, extension: str, max_seconds: float) -> list[Sound]:
    """Decode the first sound stream.

    Args:
        data: the file.
        extension: that it claims to have.
        max_seconds: limit.

    Returns:
        A stretch for each run of frames of one rate, channel layout and sample format; streams may change them.

    Raises:
        MediaError: no sound, damaged, longer than `max_seconds`, without samples, or with values that are not finite.
    """
    try:
        with _container(data, extension) as container:
            found = list(_runs(container.decode(_stream(container, "audio")), max_seconds))
    except Exception as error:  # decoders raise whatever a hostile file provokes in them
        raise _named("audio", error) from None
    if not found:
        raise MediaError("unreadable audio", "no samples")
    if not all(np.isfinite(sound.samples).all() for sound in found):
        raise MediaError("unreadable audio", "it holds values that are not finite")
    return found


def _runs(frames: Iterator[av.AudioFrame], max_seconds: float) -> Iterator[Sound]:
    form, clip, seconds = None, None, 0.0
    for frame in frames:
        if not 0 < frame.sample_rate <= MAX_SAMPLE_RATE:
            raise MediaError("unreadable audio", f"{frame.sample_rate} samples a second, limit {MAX_SAMPLE_RATE}")
        seconds += frame.samples / frame.sample_rate
        if seconds > max_seconds:
            raise MediaError("too long", f"more than {max_seconds} s")
        frame.pts = None
        # A queue that is given a frame of another layout crashes the process.
        if (now := (frame.sample_rate, frame.layout.name, frame.format.name)) != form:
            yield from _read(clip)
            form, clip = now, av.AudioFifo()  # joins codec frames of a few milliseconds
        clip.write(frame)
    yield from _read(clip)


def _read(clip: av.AudioFifo | None) -> Iterator[Sound]:
    whole = clip.read() if clip is not None else None
    if whole is not None:
        yield Sound(_mono(_array(whole), whole.format, whole.layout.nb_channels), whole.sample_rate)


def _array(frame: av.AudioFrame) -> np.ndarray:
    if not frame.format.name.startswith("s64"):
        return frame.to_ndarray()
    # PyAV has no type for these.
    length = frame.samples * (1 if frame.format.is_planar else frame.layout.nb_channels)
    return np.stack([np.frombuffer(plane, np.int64)[:length] for plane in frame.planes])


def _mono(samples: np.ndarray, form: av.AudioFormat, channels: int) -> np.ndarray:
    samples = samples.astype(np.float32)
    kind = form.name.removesuffix("p")
    if kind in _FULL_SCALE:
        samples = samples / np.float32(_FULL_SCALE[kind]) - np.float32(kind == "u8")
    return (samples if form.is_planar else samples.reshape(-1, channels).T).mean(axis=0)


def probe_video(data: bytes, extension: str, max_seconds: float, max_pixels: int) -> FrameTimes:
    """Size and times of the frames that a player shows, from all packets and one decoded frame.

    Args:
        data: the file.
        extension: that it claims to have.
        max_seconds, max_pixels: limits.

    Raises:
        MediaError: no video, damaged, too long or too large.
    """
    try:
        with _container(data, extension) as container:
            stream = _stream(container, "video")
            _check_pixels(stream.codec_context.width, stream.codec_context.height, max_pixels)
            rate, base = float(stream.average_rate or 25), float(stream.time_base)
            # Packets outside of an edit list are there to be decoded, not to be shown.
            shown = [
                (packet.pts, packet.duration or 0)
                for packet in container.demux(stream)
                if packet.size and not packet.is_discard
            ]
        if not shown:
            raise MediaError("unreadable video", "no frames")
        ticks = None if any(tick is None for tick, _ in shown) else sorted(tick for tick, _ in shown)
        if ticks is None:
            seconds, duration = [index / rate for index in range(len(shown))], len(shown) / rate
        else:
            seconds = [(tick - ticks[0]) * base for tick in ticks]
            duration = (max(tick + length for tick, length in shown) - ticks[0]) * base
        if duration > max_seconds:
            raise MediaError("too long", f"{duration:.1f} s, limit {max_seconds} s")
        first = next(decoded_frames(data, extension))
    except StopIteration:
        raise MediaError("unreadable video", "no packet can be decoded") from None
    except Exception as error:  # as for sound
        raise _named("video", error) from None
    height, width = first.height, first.width
    if _turn(first)[0]:
        height, width = width, height
    _check_pixels(width, height, max_pixels)
    return FrameTimes(height, width, seconds, ticks, duration)


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise MediaError("too many pixels", f"{width} x {height}, limit {max_pixels}")


def decoded_frames(data: bytes, extension: str) -> Iterator[av.VideoFrame]:
    """The frames of the first video stream in the order in which they are shown.

    Raises:
        MediaError, av.FFmpegError: no video, or damaged.
    """
    with _container(data, extension) as container:
        yield from container.decode(_stream(container, "video"))


def decode_frames(
    data: bytes, extension: str, ticks: tuple[int, ...] | None, indices: tuple[int, ...], height: int, width: int
) -> np.ndarray:
    """Decode and resize the frames that are shown at given times.

    Args:
        data: the file.
        extension: that it claims to have.
        ticks: ascending times, in the units of the container; None takes the frames by their numbers.
        indices: ascending numbers of the frames, one per time.
        height, width: of the result.

    Returns:
        uint8 [len(indices), height, width, 3].

    Raises:
        MediaError: the video is damaged or ends too early.
    """
    wanted = list(indices if ticks is None else ticks)
    pictures: list[np.ndarray] = []
    # Not frame.to_image(): PyAV keeps its scaler for good, and with it threads for which a forked process would wait.
    scaler = VideoReformatter()

    def take(frame: av.VideoFrame) -> None:
        picture = Image.fromarray(upright_frame(frame, scaler))
        pictures.append(np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)))

    last, at, step = None, None, 0
    try:
        for number, frame in enumerate(decoded_frames(data, extension)):
            now = number if ticks is None or frame.pts is None else frame.pts
            while len(pictures) < len(wanted) and now > wanted[len(pictures)]:
                take(last or frame)  # a frame is shown until the next one comes
            if len(pictures) == len(wanted):
                break
            step = max(step, now - at) if at is not None else 0
            last, at = frame, now
        # The last packets may hold no frames of their own.
        end = None if last is None else at + (0 if ticks is None else step)
        while end is not None and len(pictures) < len(wanted) and wanted[len(pictures)] <= end:
            take(last)
    except Exception as error:  # as for sound
        raise _named("video", error) from None
    if len(pictures) != len(wanted):
        raise MediaError("unreadable video", f"it ends after {len(pictures)} of {len(wanted)} sampled frames")
    return np.stack(pictures)


def _turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    if SideData.DISPLAYMATRIX not in frame.side_data:
        return False, False, False
    return turn_of(struct.unpack("=9i", memoryview(frame.side_data[SideData.DISPLAYMATRIX])[:36]))


def turn_of(matrix: tuple[int, ...]) -> tuple[bool, bool, bool]:
    """Whether a picture is to be transposed, then mirrored, then turned upside down to be upright.

    Args:
        matrix: FFmpeg's display matrix by rows: a point (x, y) is shown at (a x + c y, b x + d y).
    """
    a, b, _, c, d, *_ = matrix
    if abs(b) > abs(a):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def turned(pixels: np.ndarray, turn: tuple[bool, bool, bool]) -> np.ndarray:
    """A picture [height, width, 3] after a turn."""
    transposed, mirrored, upside_down = turn
    if transposed:
        pixels = pixels.transpose(1, 0, 2)
    return np.ascontiguousarray(pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1])


def is_turned(frame: av.VideoFrame) -> bool:
    """Whether a frame is displayed otherwise than it is stored."""
    return any(_turn(frame))


def upright_frame(frame: av.VideoFrame, scaler: VideoReformatter) -> np.ndarray:
    """A frame as it is displayed, uint8 [height, width, 3]."""
    return turned(scaler.reformat(frame, format="rgb24", threads=1).to_ndarray(), _turn(frame))
