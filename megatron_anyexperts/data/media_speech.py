"""Decoded sound as the speech features want it."""

import math

import numpy as np
from scipy.fft import next_fast_len

from megatron_anyexperts.data.media_stream import Sound, decode_sound
from megatron_anyexperts.media import SAMPLE_RATE, WINDOW


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Sound at 16 kHz: band-limited, over the whole clip.

    Args:
        samples: float32 [n].
        rate: of the samples.

    Returns:
        float32 [n * 16000 / rate], rounded up.
    """
    # FFmpeg's resampler costs more than decoding does, and its filter graph keeps
    # threads that a forked worker waits for without end.
    step = rate // math.gcd(rate, SAMPLE_RATE)
    # A tenth of a second of silence keeps the end apart from the start.
    steps = next_fast_len(-(-(len(samples) + rate // 10) // step), real=True)
    length, result = steps * step, steps * (SAMPLE_RATE * step // rate)
    spectrum = np.fft.rfft(samples, length)[: result // 2 + 1]
    resampled = np.fft.irfft(spectrum, result) * (result / length)
    return resampled[: -(-len(samples) * SAMPLE_RATE // rate)].astype(np.float32)


def decode_speech(data: bytes, extension: str, max_seconds: float) -> np.ndarray:
    """The first sound stream of a file as 16 kHz mono; less than one analysis window is followed by silence.

    Args:
        data: the file.
        extension: that it claims to have.
        max_seconds: limit.

    Returns:
        float32 [n], n at least 400.

    Raises:
        MediaError: as `decode_sound`.
    """
    return joined(decode_sound(data, extension, max_seconds))


def joined(sounds: list[Sound]) -> np.ndarray:
    """Stretches of sound of any rates as one at 16 kHz, float32 [n]."""
    parts = [part.samples if part.rate == SAMPLE_RATE else resample(part.samples, part.rate) for part in sounds]
    samples = np.concatenate(parts)
    return np.pad(samples, (0, max(0, WINDOW - len(samples))))
