import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.data import media_decode, media_speech
from megatron_anyexperts.data.log_mel import log_mel
from megatron_anyexperts.data.media_stream import Sound
from tests.feed import corpus


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([(28, 14), (14, 14), (32, 16)]))
def test_fitted_sizes_are_multiples_within_the_limits(height, width, geometry):
    multiple, patch = geometry
    rows, columns = media_decode.fit_grid(height, width, multiple, patch, 16, 1024)
    assert rows % multiple == 0 and columns % multiple == 0
    assert rows * columns // patch**2 <= 1024


@given(st.integers(200, 1500), st.integers(200, 1500))
def test_ordinary_pictures_keep_their_aspect(height, width):
    rows, columns = media_decode.fit_grid(height, width, 28, 14, 16, 1024)
    assert abs(np.log((rows / columns) / (height / width))) < 0.25


def test_small_pictures_are_enlarged_to_the_minimum():
    rows, columns = media_decode.fit_grid(10, 10, 28, 14, 64, 1024)
    assert rows * columns // 14**2 == 64


def test_patches_are_cut_in_raster_order():
    image = np.zeros((4, 6, 3), np.uint8)
    image[0:2, 2:4, 1] = 255
    patches = media_decode.patchify(image, 2)
    assert patches.shape == (6, 12)
    expected = np.full((6, 12), -1.0, np.float32)
    expected[1, 4:8] = 1.0  # the second patch, green channel
    np.testing.assert_allclose(patches, expected, atol=1e-6)


def test_sound_becomes_16_khz_mono():
    samples = media_speech.decode_speech(corpus.wav_bytes(0, seconds=0.5), "wav", 1.0)
    assert abs(len(samples) - 8000) <= 16
    peak = np.abs(np.fft.rfft(samples)).argmax() * 16_000 / len(samples)
    assert abs(peak - 200) < 4


def test_stretches_of_several_rates_are_joined_and_short_ones_padded_with_silence():
    joined = media_speech.joined([Sound(np.ones(800, np.float32), 8000), Sound(np.ones(1600, np.float32), 16_000)])
    assert len(joined) == 3200 and joined.dtype == np.float32
    short = media_speech.joined([Sound(np.ones(160, np.float32), 16_000)])
    assert len(short) == 400 and short[:160].all() and not short[160:].any()
    assert log_mel(short, 80).shape == (2, 80)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_resampling_keeps_a_tone(rate):
    length = int(0.3 * rate)
    tone = np.sin(2 * np.pi * 440 * np.arange(length) / rate).astype(np.float32)
    resampled = media_speech.resample(tone, rate)
    assert len(resampled) == -(-length * 16_000 // rate)
    expected = np.sin(2 * np.pi * 440 * np.arange(len(resampled)) / 16_000)
    np.testing.assert_allclose(resampled[200:-200], expected[200:-200], atol=0.02)


def test_a_tone_lights_its_mel_bin():
    time = np.arange(16_000) / 16_000
    low, high = (log_mel(np.sin(2 * np.pi * f * time).astype(np.float32), 80).mean(0).argmax() for f in (300, 3000))
    assert low < high
    assert log_mel(np.zeros(400, np.float32), 80).shape == (2, 80)


@given(st.integers(1, 400), st.floats(0.5, 30), st.floats(0.1, 10), st.integers(1, 32))
def test_sampled_frames_ascend_within_the_budget(count, rate, fps, budget):
    frames = media_decode.sample_frames([index / rate for index in range(count)], fps, budget)
    assert 1 <= len(frames) <= min(budget, count)
    assert list(frames) == sorted(set(frames)) and frames[-1] < count
