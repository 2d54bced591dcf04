"""Log-mel features of speech, computed as Whisper's front end does (16 kHz, 25 ms window, 10 ms hop)."""

from functools import lru_cache

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

from megatron_anyexperts.media import HOP, SAMPLE_RATE, WINDOW


@lru_cache
def _filters(n_mels: int) -> torch.Tensor:
    bins = WINDOW // 2 + 1
    bank = mel_filter_bank(bins, n_mels, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(bank.astype(np.float32))


@lru_cache
def _window() -> torch.Tensor:
    return torch.hann_window(WINDOW)


def log_mel(samples: np.ndarray, n_mels: int) -> np.ndarray:
    """Log-mel spectrogram of a mono clip.

    Args:
        samples: float32 [n] at 16 kHz in [-1, 1]; n must exceed half a window (200).
        n_mels: mel bins.

    Returns:
        float32 [n // 160, n_mels] (at least one frame): the clip's loudest 80 dB, scaled to a span of 2.
    """
    wave = torch.from_numpy(np.ascontiguousarray(samples))
    spectrum = torch.stft(wave, WINDOW, HOP, window=_window(), return_complex=True)
    frames = max(1, len(samples) // HOP)
    power = spectrum[:, :frames].abs().square()
    decades = (power.T @ _filters(n_mels)).clamp(min=1e-10).log10()
    decades = torch.maximum(decades, decades.max() - 8.0)
    return ((decades + 4.0) / 4.0).numpy()
