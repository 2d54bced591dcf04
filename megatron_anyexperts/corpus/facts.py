"""What there is to know about one medium: read completely, with the functions that the loader reads with."""

from dataclasses import dataclass

from megatron_anyexperts.data.media_forms import MediaError, brief, stream_form
from megatron_anyexperts.data.media_image import image_size, load_image
from megatron_anyexperts.data.media_stream import decode_sound, decoded_frames, probe_video


@dataclass(frozen=True)
class Facts:
    """What probing found out about one medium; sides are those of the picture as it is displayed."""

    type: str
    extension: str
    width: int = 0
    height: int = 0
    seconds: float = 0.0
    frames: int = 0


@dataclass(frozen=True)
class Bounds:
    """The limits of `corpus.Limits` that concern one medium."""

    max_pixels: int
    min_side: int
    max_aspect: float
    min_seconds: float
    max_audio_seconds: float
    max_video_seconds: float


def _image(data: bytes, limits: Bounds) -> Facts:
    height, width, extension = image_size(data, limits.max_pixels)
    _check_sides(width, height, limits)
    load_image(data, limits.max_pixels)
    return Facts("image", extension, width, height, frames=1)


def _audio(data: bytes, limits: Bounds) -> Facts:
    extension, _ = stream_form(data)
    sounds = decode_sound(data, extension, limits.max_audio_seconds)
    seconds = sum(len(sound.samples) / sound.rate for sound in sounds)
    _check_seconds(seconds, limits)
    return Facts("audio", extension, seconds=round(seconds, 3))


def _video(data: bytes, limits: Bounds) -> Facts:
    extension, _ = stream_form(data)
    times = probe_video(data, extension, limits.max_video_seconds, limits.max_pixels)
    _check_sides(times.width, times.height, limits)
    _check_seconds(times.duration, limits)
    try:
        frames = sum(1 for _ in decoded_frames(data, extension))
    except Exception as error:  # decoders raise whatever a hostile file provokes in them
        raise MediaError("unreadable video", brief(error)) from None
    return Facts("video", extension, times.width, times.height, round(times.duration, 3), frames)


def _check_sides(width: int, height: int, limits: Bounds) -> None:
    if min(width, height) < limits.min_side:
        raise MediaError("too small", f"{width} x {height}, min_side {limits.min_side}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise MediaError("too elongated", f"{width} x {height}, max_aspect {limits.max_aspect}")


def _check_seconds(seconds: float, limits: Bounds) -> None:
    if seconds < limits.min_seconds:
        raise MediaError("too short", f"{seconds:.3f} s, min_seconds {limits.min_seconds}")


PROBES = {"image": _image, "audio": _audio, "video": _video}
"""What is called in the decoder process, which therefore imports little."""
