import dataclasses
import io
import multiprocessing

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_anyexperts.data import media_decode
from megatron_anyexperts.data.log_mel import log_mel
from megatron_anyexperts.data.samples import Media, SampleError
from tests.data.feed import corpus


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([(28, 14), (14, 14), (32, 16)]))
def test_fitted_sizes_are_multiples_within_the_limits(height, width, geometry):
    multiple, patch = geometry
    rows, columns = media_decode.fit_grid(height, width, multiple, patch, 16, 1024)
    assert rows % multiple == 0 and columns % multiple == 0
    assert rows * columns // patch**2 <= 1024


@settings(deadline=None)
@given(st.integers(200, 1500), st.integers(200, 1500))
def test_ordinary_pictures_keep_their_aspect(height, width):
    rows, columns = media_decode.fit_grid(height, width, 28, 14, 16, 1024)
    assert abs(np.log((rows / columns) / (height / width))) < 0.25


def test_small_pictures_are_enlarged_to_the_minimum():
    rows, columns = media_decode.fit_grid(10, 10, 28, 14, 64, 1024)
    assert rows * columns // 14**2 == 64


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_every_mode_becomes_rgb(mode, form):
    if mode == "CMYK" and form == "PNG":
        return
    buffer = io.BytesIO()
    Image.new(mode, (20, 10)).save(buffer, form)
    assert media_decode.decode_image(buffer.getvalue(), 28, 56, 10_000).shape == (28, 56, 3)


def test_transparent_pixels_become_white():
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(buffer, "PNG")
    assert (media_decode.decode_image(buffer.getvalue(), 8, 8, 100) == 255).all()


def test_camera_orientation_is_applied():
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste("white", (0, 0, 20, 20))  # left half
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed turned clockwise: left becomes top
    picture.save(buffer, "JPEG", exif=exif, quality=95)
    assert media_decode.image_size(buffer.getvalue(), 1000) == (40, 20)
    turned = media_decode.decode_image(buffer.getvalue(), 40, 20, 1000)
    assert turned[:15].mean() > 200 and turned[25:].mean() < 50


def test_a_decompression_bomb_is_refused_by_its_header():
    buffer = io.BytesIO()
    Image.new("1", (5_000, 5_000)).save(buffer, "PNG")
    with pytest.raises(SampleError, match="5000 x 5000 pixels exceeds data_image_max_pixels=1000"):
        media_decode.image_size(buffer.getvalue(), 1000)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_rejected_not_crashed_on(data):
    for read in (
        lambda: media_decode.image_size(data, 1000),
        lambda: media_decode.decode_audio(Media("audio", data, "ogg"), 5),
        lambda: media_decode.probe_video(Media("video", data, "mp4"), 5, 1000),
    ):
        with pytest.raises(SampleError):
            read()


def test_patches_are_cut_in_raster_order():
    image = np.zeros((4, 6, 3), np.uint8)
    image[0:2, 2:4, 1] = 255
    patches = media_decode.patchify(image, 2)
    assert patches.shape == (6, 12)
    expected = np.full((6, 12), -1.0, np.float32)
    expected[1, 4:8] = 1.0  # the second patch, green channel
    np.testing.assert_allclose(patches, expected, atol=1e-6)


def test_audio_becomes_16_khz_mono():
    samples = media_decode.decode_audio(Media("audio", corpus.wav_bytes(0, seconds=0.5), "wav"), 1.0)
    assert abs(len(samples) - 8000) <= 16
    peak = np.abs(np.fft.rfft(samples)).argmax() * 16_000 / len(samples)
    assert abs(peak - 200) < 4


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_resampling_keeps_a_tone(rate):
    length = int(0.3 * rate)
    tone = np.sin(2 * np.pi * 440 * np.arange(length) / rate).astype(np.float32)
    resampled = media_decode._resample(tone, rate)
    assert len(resampled) == -(-length * 16_000 // rate)
    expected = np.sin(2 * np.pi * 440 * np.arange(len(resampled)) / 16_000)
    np.testing.assert_allclose(resampled[200:-200], expected[200:-200], atol=0.02)


def test_long_audio_is_rejected_not_cut():
    with pytest.raises(SampleError, match="longer than data_audio_max_seconds=0.4"):
        media_decode.decode_audio(Media("audio", corpus.wav_bytes(0, seconds=0.5), "wav"), 0.4)


def test_a_tone_lights_its_mel_bin():
    time = np.arange(16_000) / 16_000
    low, high = (log_mel(np.sin(2 * np.pi * f * time).astype(np.float32), 80).mean(0).argmax() for f in (300, 3000))
    assert low < high
    assert log_mel(np.zeros(400, np.float32), 80).shape == (2, 80)


@settings(deadline=None)
@given(st.integers(1, 400), st.floats(0.5, 30), st.floats(0.1, 10), st.integers(1, 32))
def test_sampled_frames_ascend_within_the_budget(count, rate, fps, budget):
    frames = media_decode.sample_frames([index / rate for index in range(count)], fps, budget)
    assert 1 <= len(frames) <= min(budget, count)
    assert list(frames) == sorted(set(frames)) and frames[-1] < count


def test_a_video_gives_the_frames_that_were_asked_for():
    media = Media("video", corpus.mp4_bytes(0), "mp4")
    height, width, times = media_decode.probe_video(media, 10, 10_000)
    assert (height, width, len(times)) == (48, 64, 12) and times[-1] == pytest.approx(11 / 4)
    pictures = media_decode.decode_frames(media, (0, 11), 28, 28)
    assert [picture.shape for picture in pictures] == [(28, 28, 3)] * 2
    assert (pictures[0] != pictures[1]).any()


def test_a_cut_video_is_rejected():
    media = Media("video", corpus.mp4_bytes(0), "mp4")
    with pytest.raises(SampleError):
        cut = dataclasses.replace(media, data=media.data[: len(media.data) // 2])
        media_decode.probe_video(cut, 10, 10_000)
    with pytest.raises(SampleError, match="ends after 1 of 2 sampled frames"):
        media_decode.decode_frames(media, (0, 99), 28, 28)
    with pytest.raises(SampleError, match="exceeds data_video_max_seconds=1"):
        media_decode.probe_video(media, 1, 10_000)


@pytest.mark.parametrize("form", ["u8", "s16", "s32", "flt", "fltp", "dbl", "s16p"])
@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_every_sample_format_is_scaled_to_one(form, layout):
    channels = 1 if layout == "mono" else 2
    wave = np.repeat(np.array([[0.0, 0.5, -0.5, 0.25]]), channels, axis=0)
    scale = {"u8": 128, "s16": 2**15, "s32": 2**31}.get(form.removesuffix("p"), 1.0)
    raw = wave * scale + 128 * (form == "u8")
    kind = {"u8": "u1", "s16": "i2", "s32": "i4", "flt": "f4", "dbl": "f8"}[form.removesuffix("p")]
    raw = raw if form.endswith("p") else raw.T.reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(raw.astype(kind)), format=form, layout=layout)
    mono = media_decode._mono(frame.to_ndarray(), frame.format, channels)
    np.testing.assert_allclose(mono, wave[0], atol=0.01)


def decode_a_video() -> None:
    media = Media("video", corpus.mp4_bytes(0), "mp4")
    assert len(media_decode.decode_frames(media, (0, 3), 28, 28)) == 2


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_worker_forked_after_a_video_was_decoded_decodes_too():
    decode_a_video()
    worker = multiprocessing.get_context("fork").Process(target=decode_a_video)
    worker.start()
    worker.join(30)
    worker.kill()
    assert worker.exitcode == 0
