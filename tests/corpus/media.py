"""Encoded sound and video of any codec, container and shape, made by FFmpeg."""

import io
from fractions import Fraction

import av
import numpy as np


def tone(seconds: float, rate: int, layout: str, pitch: float = 440.0) -> np.ndarray:
    """float32 [channels, n], full scale a half."""
    wave = 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)
    return np.tile(wave.astype(np.float32), (av.AudioLayout(layout).nb_channels, 1))


def encoded_audio(codec: str, container: str, rate: int, layout: str, samples: np.ndarray, **options: str) -> bytes:
    """A sound file of float32 [channels, n] samples."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, container_options=options) as file:
        stream = file.add_stream(codec, rate=rate, layout=layout)
        resampler = av.AudioResampler(format=stream.format, layout=layout, rate=rate, frame_size=1024)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def mp3_that_changes_its_channels() -> bytes:
    """A second in stereo, then a second in mono, as when recordings are joined."""
    return b"".join(
        encoded_audio("mp3", "mp3", 44_100, layout, tone(1, 44_100, layout, pitch), id3v2_version="0", write_xing="0")
        for layout, pitch in (("stereo", 440), ("mono", 880))
    )


def moving(number: int, width: int, height: int) -> np.ndarray:
    """Frame `number` of a bright block that moves over a slope of colours, uint8 [height, width, 3]."""
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.stack([rows * 255 // height, columns * 255 // width, np.full_like(rows, number * 9 % 256)], axis=2)
    left = number * 5 % max(1, width - 8)
    picture[: height // 2, left : left + 8] = 255
    return picture.astype(np.uint8)


def encoded_video(
    codec: str, container: str, width: int, height: int, frames: int, rate: float, rotation: int = 0, starts_at: int = 0
) -> bytes:
    """A video file.

    Args:
        rotation: degrees to turn it counterclockwise for display.
        starts_at: number of the first frame; negative ones lie before the start of the presentation.
    """
    rate = Fraction(rate).limit_denominator(1000)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.bit_rate = width, height, 2_000_000
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(moving(number, width, height)).reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = number + starts_at, 1 / rate
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()
