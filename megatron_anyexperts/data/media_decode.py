"""Decodes images, audio and video, with limits that act before memory is spent."""

import io
import math

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, UnidentifiedImageError
from scipy.fft import next_fast_len

from megatron_anyexperts.data.log_mel import SAMPLE_RATE, WINDOW
from megatron_anyexperts.data.samples import Media, SampleError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VIDEO_DEMUXERS = {"mp4": "mp4", "m4v": "mp4", "mov": "mov", "mkv": "matroska", "webm": "matroska", "avi": "avi"}
AUDIO_DEMUXERS = VIDEO_DEMUXERS | {
    "ogg": "ogg", "oga": "ogg", "opus": "ogg", "wav": "wav", "flac": "flac", "mp3": "mp3", "m4a": "mp4", "aac": "aac",
}  # fmt: skip

_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_SWAPS_SIDES = {5, 6, 7, 8}  # EXIF orientations that exchange width and height
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def _open_image(data: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    try:
        image = Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError(f"unreadable image: {error}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise SampleError(f"image of {width} x {height} pixels exceeds data_image_max_pixels={max_pixels}")
    # Other formats would have to be decoded to find a tag that practically only cameras write.
    orientation = image.getexif().get(0x0112, 1) if image.format in ("JPEG", "MPO") else 1
    return image, orientation


def image_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """(height, width) in pixels as displayed, from the header alone.

    Raises:
        SampleError: no image, or more than `max_pixels`.
    """
    image, orientation = _open_image(data, max_pixels)
    width, height = image.size
    return (width, height) if orientation in _SWAPS_SIDES else (height, width)


def decode_image(data: bytes, height: int, width: int, max_pixels: int) -> np.ndarray:
    """Decode and resize an image; transparency is laid over white.

    Returns:
        uint8 [height, width, 3].

    Raises:
        SampleError: the file is damaged or larger than `max_pixels`.
    """
    image, orientation = _open_image(data, max_pixels)
    try:
        swapped = orientation in _SWAPS_SIDES
        image.draft("RGB", (height, width) if swapped else (width, height))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if orientation in _TRANSPOSE:
            image = image.transpose(_TRANSPOSE[orientation])
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(image)
    except (OSError, ValueError, SyntaxError, MemoryError, EOFError) as error:
        raise SampleError(f"damaged image: {error}") from error


def fit_grid(
    height: int, width: int, multiple: int, patch_size: int, min_patches: int, max_patches: int
) -> tuple[int, int]:
    """(height, width) in pixels closest to the native size: multiples of `multiple`, aspect about kept,
    with a patch count inside the limits wherever the aspect ratio allows it and never above `max_patches`.

    Raises:
        SampleError: the aspect ratio is so extreme that one row or column of merged patches exceeds `max_patches`.
    """
    area = patch_size**2
    scale = 1.0
    if height * width > max_patches * area:
        scale = math.sqrt(max_patches * area / (height * width))
    elif height * width < min_patches * area:
        scale = math.sqrt(min_patches * area / (height * width))
    rows = max(1, round(height * scale / multiple))
    columns = max(1, round(width * scale / multiple))
    limit = max_patches * area // multiple**2
    while rows * columns > limit:  # rounding up may overshoot; shrink the longer side
        if rows >= columns and rows > 1:
            rows -= 1
        elif columns > 1:
            columns -= 1
        else:
            raise SampleError(f"max_patches={max_patches} is less than one merged patch; raise it")
    return rows * multiple, columns * multiple


def patchify(image: np.ndarray, patch_size: int) -> np.ndarray:
    """Cut an image into flattened, normalised patches in raster order.

    Args:
        image: uint8 [h * p, w * p, 3].

    Returns:
        float32 [h * w, 3 * p * p]; channel first inside a patch; (x / 255 - 0.5) / 0.5.
    """
    rows, columns = image.shape[0] // patch_size, image.shape[1] // patch_size
    patches = image.reshape(rows, patch_size, columns, patch_size, 3).transpose(0, 2, 4, 1, 3)
    return patches.reshape(rows * columns, -1).astype(np.float32) * np.float32(2 / 255) - np.float32(1)


def _open_stream(media: Media) -> av.container.InputContainer:
    # Left to guess, FFmpeg also accepts play lists, and those make it open other files and addresses.
    demuxers = AUDIO_DEMUXERS if media.modality == "audio" else VIDEO_DEMUXERS
    return av.open(io.BytesIO(media.data), format=demuxers[media.extension])


_FULL_SCALE = {"u8": 2.0**7, "s16": 2.0**15, "s32": 2.0**31}


def _mono(samples: np.ndarray, form: av.AudioFormat, channels: int) -> np.ndarray:
    samples = samples.astype(np.float32)
    kind = form.name.removesuffix("p")
    if kind in _FULL_SCALE:
        samples = samples / np.float32(_FULL_SCALE[kind]) - np.float32(kind == "u8")
    return (samples if form.is_planar else samples.reshape(-1, channels).T).mean(axis=0)


def _resample(samples: np.ndarray, rate: int) -> np.ndarray:
    # Band-limited, over the whole clip. FFmpeg's resampler costs more than decoding does, and its filter graph keeps
    # threads that a forked worker waits for without end.
    step = rate // math.gcd(rate, SAMPLE_RATE)
    # A tenth of a second of silence keeps the end apart from the start.
    steps = next_fast_len(-(-(len(samples) + rate // 10) // step), real=True)
    length, result = steps * step, steps * (SAMPLE_RATE * step // rate)
    spectrum = np.fft.rfft(samples, length)[: result // 2 + 1]
    resampled = np.fft.irfft(spectrum, result) * (result / length)
    return resampled[: -(-len(samples) * SAMPLE_RATE // rate)].astype(np.float32)


def decode_audio(media: Media, max_seconds: float) -> np.ndarray:
    """Decode the first audio stream to 16 kHz mono.

    Returns:
        float32 [n].

    Raises:
        SampleError: no audio, damaged, longer than `max_seconds`, or shorter than one analysis window.
    """
    try:
        with _open_stream(media) as container:
            if not container.streams.audio:
                raise SampleError("no audio stream")
            clip, total = av.AudioFifo(), 0  # joins codec frames of a few milliseconds; refuses a change of format
            for frame in container.decode(container.streams.audio[0]):
                frame.pts = None
                clip.write(frame)
                total += frame.samples
                if total > max_seconds * frame.sample_rate:
                    raise SampleError(f"audio is longer than data_audio_max_seconds={max_seconds}")
        if not total:
            raise SampleError("audio without samples")
        whole = clip.read()
        samples = _mono(whole.to_ndarray(), whole.format, whole.layout.nb_channels)
        if whole.sample_rate != SAMPLE_RATE:
            samples = _resample(samples, whole.sample_rate)
    except (av.FFmpegError, ValueError, EOFError) as error:
        if isinstance(error, SampleError):
            raise
        raise SampleError(f"damaged audio: {error}") from error
    if len(samples) < WINDOW:
        raise SampleError(f"audio of {len(samples)} samples is shorter than one window of {WINDOW}")
    if not np.isfinite(samples).all():
        raise SampleError("audio contains values that are not finite")
    return samples


def probe_video(media: Media, max_seconds: float, max_pixels: int) -> tuple[int, int, list[float]]:
    """Size and frame times of a video, read from its packets without decoding.

    Returns:
        (height, width, presentation times in seconds, ascending from 0).

    Raises:
        SampleError: no video, damaged, too long or too large.
    """
    try:
        with _open_stream(media) as container:
            if not container.streams.video:
                raise SampleError("no video stream")
            stream = container.streams.video[0]
            height, width = stream.codec_context.height, stream.codec_context.width
            rate = float(stream.average_rate or 25)
            ticks = [packet.pts for packet in container.demux(stream) if packet.size]
            base = float(stream.time_base)
    except (av.FFmpegError, ValueError, EOFError) as error:
        if isinstance(error, SampleError):
            raise
        raise SampleError(f"damaged video: {error}") from error
    if not ticks or height < 1 or width < 1:
        raise SampleError("video without frames")
    if height * width > max_pixels:
        raise SampleError(f"video of {width} x {height} pixels exceeds data_image_max_pixels={max_pixels}")
    if None in ticks:
        times = [index / rate for index in range(len(ticks))]
    else:
        times = [(tick - min(ticks)) * base for tick in sorted(ticks)]
    if times[-1] > max_seconds:
        raise SampleError(f"video of {times[-1]:.1f} s exceeds data_video_max_seconds={max_seconds}")
    return height, width, times


def sample_frames(times: list[float], fps: float, max_frames: int) -> tuple[int, ...]:
    """Indices of the frames to keep: `fps` per second while that fits in `max_frames`, else spread evenly."""
    duration = times[-1] + (times[-1] / (len(times) - 1) if len(times) > 1 else 0.0)
    count = max(1, min(max_frames, len(times), round(duration * fps)))
    return tuple(int((index + 0.5) * len(times) / count) for index in range(count))


def decode_frames(media: Media, frames: tuple[int, ...], height: int, width: int) -> list[np.ndarray]:
    """Decode and resize the frames with the given ascending indices.

    Returns:
        uint8 [height, width, 3] arrays, one per index.

    Raises:
        SampleError: the video is damaged or ends before the last index.
    """
    wanted, pictures = set(frames), []
    # Not frame.to_image(): PyAV keeps its scaler for good, and with it threads for which a forked worker would wait.
    scaler = VideoReformatter()
    try:
        with _open_stream(media) as container:
            for index, frame in enumerate(container.decode(container.streams.video[0])):
                if index in wanted:
                    picture = Image.fromarray(scaler.reformat(frame, format="rgb24", threads=1).to_ndarray())
                    pictures.append(np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)))
                if index >= frames[-1]:
                    break
    except (av.FFmpegError, ValueError, EOFError) as error:
        raise SampleError(f"damaged video: {error}") from error
    if len(pictures) != len(frames):
        raise SampleError(f"video ends after {len(pictures)} of {len(frames)} sampled frames")
    return pictures
