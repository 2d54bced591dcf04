"""Find out what media bytes are, and refuse what is unreadable or outside the limits.

The format is taken from the bytes, never from a file name. FFmpeg is told the container it may use: left to
guess, it would accept play lists, which make it open further files.
"""

import io
import warnings
from dataclasses import dataclass

import av
import av.error
import filetype
from PIL import Image

from megatron_anyexperts.data.build.corpus import Limits
from megatron_anyexperts.data.build.sample import Media, Rejected

IMAGE_FORMATS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
CONTAINERS = {
    "ogg": "ogg", "opus": "ogg", "wav": "wav", "flac": "flac", "mp3": "mp3", "m4a": "mp4", "aac": "aac",
    "mp4": "mp4", "mov": "mov", "m4v": "mp4", "mkv": "matroska", "webm": "matroska", "avi": "avi",
}  # fmt: skip
"""Extension by content -> FFmpeg demuxer."""

av.logging.set_level(av.logging.PANIC)


@dataclass(frozen=True)
class Facts:
    """What probing found out about one medium."""

    type: str
    extension: str
    width: int = 0
    height: int = 0
    seconds: float = 0.0
    frames: int = 0


def probe(media: Media, limits: Limits) -> Facts:
    """Decode one medium and say what it is: an image or a sound completely, of a video all packets and one frame.

    Args:
        media: the bytes and what they are expected to be.
        limits: sizes and lengths that are allowed.

    Raises:
        Rejected: unreadable, of an unknown format, or outside a limit.
    """
    if not media.data:
        raise Rejected(f"empty {media.type} file")
    if len(media.data) > limits.max_media_bytes:
        raise Rejected("too many bytes", f"{len(media.data)} bytes, limit {limits.max_media_bytes}")
    if media.type == "image":
        return _probe_image(media, limits)
    return _probe_stream(media, limits)


def _probe_image(media: Media, limits: Limits) -> Facts:
    Image.MAX_IMAGE_PIXELS = limits.max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(media.data), formats=list(IMAGE_FORMATS))
            width, height = image.size
            _check_frame(width, height, limits)
            image.load()
    except Rejected:
        raise
    except Image.DecompressionBombError as error:
        # Pillow speaks of twice the limit, where it begins to refuse.
        raise Rejected("too many pixels", f"{_short(error)}, limit {limits.max_pixels}") from None
    except Exception as error:  # decoders raise whatever a hostile file provokes in them
        raise Rejected("unreadable image", _short(error)) from None
    return Facts("image", IMAGE_FORMATS[image.format], width, height, frames=1)


def _check_frame(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise Rejected("too many pixels", f"{width} x {height}, limit {limits.max_pixels}")
    if min(width, height) < limits.min_side:
        raise Rejected("too small", f"{width} x {height}, min_side {limits.min_side}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise Rejected("too elongated", f"{width} x {height}, max_aspect {limits.max_aspect}")


def container_of(data: bytes) -> tuple[str, str]:
    """Extension and FFmpeg demuxer of a sound or video file, from its first bytes.

    Raises:
        Rejected: none that is known.
    """
    guess = filetype.guess(data[:8192])
    extension = guess.extension if guess else ""
    if extension not in CONTAINERS:
        raise Rejected("unknown media format", f"looks like {extension or 'nothing known'}")
    return extension, CONTAINERS[extension]


def _probe_stream(media: Media, limits: Limits) -> Facts:
    extension, demuxer = container_of(media.data)
    longest = limits.max_audio_seconds if media.type == "audio" else limits.max_video_seconds
    width = height = frames = 0
    try:
        with av.open(io.BytesIO(media.data), format=demuxer) as container:
            streams = getattr(container.streams, media.type)
            if not streams:
                raise Rejected(f"no {media.type} in the file", extension)
            stream = streams[0]
            if media.type == "audio":
                seconds = _decoded_seconds(container, stream, longest)
            else:
                seconds, frames = _packet_seconds(container, stream, longest)
            if media.type == "video":
                width, height = stream.codec_context.width, stream.codec_context.height
                _check_frame(width, height, limits)
                container.seek(0)
                next(container.decode(stream))
    except Rejected:
        raise
    except Exception as error:  # as for images
        raise Rejected(f"unreadable {media.type}", _short(error)) from None
    if seconds < limits.min_seconds:
        raise Rejected("too short", f"{seconds:.3f} s, min_seconds {limits.min_seconds}")
    frames = frames if media.type == "video" else 0
    return Facts(media.type, extension, width, height, round(seconds, 3), frames)


def _check_length(seconds: float, longest: float) -> None:
    if seconds > longest:
        raise Rejected("too long", f"more than {longest} s")


def _decoded_seconds(container, stream, longest: float) -> float:
    seconds = 0.0
    for frame in container.decode(stream):
        seconds += frame.samples / frame.sample_rate
        _check_length(seconds, longest)
    return seconds


def _packet_seconds(container, stream, longest: float) -> tuple[float, int]:
    first = last = None
    packets = 0
    for packet in container.demux(stream):
        if packet.pts is None:
            continue
        packets += 1
        end = packet.pts + (packet.duration or 0)
        first = packet.pts if first is None else min(first, packet.pts)
        last = end if last is None else max(last, end)
        _check_length(float((last - first) * stream.time_base), longest)
    if first is None:
        raise Rejected(f"unreadable {stream.type}", "no packet")
    return float((last - first) * stream.time_base), packets


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
