import io
import multiprocessing
import shutil
import subprocess
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.data import media_stream
from megatron_anyexperts.data.media_forms import MediaError
from megatron_anyexperts.data.media_stream import decode_frames, decode_sound, probe_video
from tests.corpus.media import encoded_audio, encoded_video, mp3_that_changes_its_channels
from tests.feed import corpus


def test_a_sound_that_changes_its_channels_is_read_on_as_mono():
    data = mp3_that_changes_its_channels()
    first, second = decode_sound(data, "mp3", 30)
    assert (first.rate, second.rate) == (44_100, 44_100)
    assert min(len(first.samples), len(second.samples)) > 0.9 * 44_100
    for part, pitch in ((first, 440), (second, 880)):
        middle = part.samples[10_000:30_000]
        assert abs(np.abs(np.fft.rfft(middle)).argmax() * 44_100 / len(middle) - pitch) < 5


def test_long_sound_is_rejected_not_cut():
    with pytest.raises(MediaError, match="too long: more than 0.4 s"):
        decode_sound(corpus.wav_bytes(0, seconds=0.5), "wav", 0.4)


@pytest.mark.parametrize("form", ["u8", "s16", "s32", "s64", "flt", "fltp", "dbl", "s16p"])
@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_every_sample_format_is_scaled_to_one(form, layout):
    channels = 1 if layout == "mono" else 2
    wave = np.repeat(np.array([[0.0, 0.5, -0.5, 0.25]]), channels, axis=0)
    scale = {"u8": 128, "s16": 2**15, "s32": 2**31, "s64": 2**63}.get(form.removesuffix("p"), 1.0)
    raw = wave * scale + 128 * (form == "u8")
    kind = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}[form.removesuffix("p")]
    raw = np.ascontiguousarray((raw if form.endswith("p") else raw.T.reshape(1, -1)).astype(kind))
    mono = media_stream._mono(raw, av.AudioFormat(form), channels)
    np.testing.assert_allclose(mono, wave[0], atol=0.01)


def test_an_absurd_sample_rate_is_rejected_before_it_costs_memory():
    data = bytearray(corpus.wav_bytes(0))
    data[24:28] = (2_000_000_000).to_bytes(4, "little")
    with pytest.raises(MediaError, match="unreadable audio: 2000000000 samples a second, limit 768000"):
        decode_sound(bytes(data), "wav", 30)


def test_sound_that_is_not_finite_is_rejected():
    samples = np.zeros((1, 4000), np.float32)
    samples[0, 7] = np.nan
    with pytest.raises(MediaError, match="not finite"):
        decode_sound(encoded_audio("pcm_f32le", "wav", 8000, "mono", samples), "wav", 30)


@given(st.binary(max_size=200))
def test_random_bytes_are_rejected_not_crashed_on(data):
    for start, read in (
        (b"OggS", lambda content: decode_sound(content, "ogg", 5)),
        (b"\0\0\0\x08ftyp", lambda content: probe_video(content, "mp4", 5, 1000)),
        (b"", lambda content: probe_video(content, "mp4", 5, 1000)),
    ):
        with pytest.raises(MediaError):
            read(start + data)


def all_frames(data: bytes) -> np.ndarray:
    times = probe_video(data, "mp4", 60, 10**6)
    return decode_frames(data, "mp4", tuple(times.ticks), tuple(range(len(times.ticks))), times.height, times.width)


def test_a_video_gives_the_frames_that_were_asked_for():
    data = corpus.mp4_bytes(0)
    times = probe_video(data, "mp4", 10, 10_000)
    assert (times.height, times.width, len(times.seconds)) == (48, 64, 12)
    assert times.seconds[-1] == pytest.approx(11 / 4) and times.duration == pytest.approx(3)
    pictures = decode_frames(data, "mp4", (times.ticks[0], times.ticks[11]), (0, 11), 48, 64)
    assert (pictures == all_frames(data)[[0, 11]]).all() and (pictures[0] != pictures[1]).any()
    by_number = decode_frames(data, "mp4", None, (0, 11), 48, 64)
    assert (by_number == pictures).all()


def test_a_time_between_two_frames_shows_the_earlier_one():
    data = corpus.mp4_bytes(0)
    ticks = probe_video(data, "mp4", 10, 10_000).ticks
    shown = decode_frames(data, "mp4", (ticks[3] + 1, ticks[11] + 1), (3, 11), 48, 64)
    assert (shown == all_frames(data)[[3, 11]]).all()


def test_a_cut_video_is_rejected():
    data = corpus.mp4_bytes(0)
    with pytest.raises(MediaError, match="unreadable video"):
        probe_video(data[: len(data) // 2], "mp4", 10, 10_000)
    ticks = probe_video(data, "mp4", 10, 10_000).ticks
    with pytest.raises(MediaError, match="ends after 1 of 2 sampled frames"):
        decode_frames(data, "mp4", (0, 3 * ticks[-1]), (0, 99), 28, 28)
    with pytest.raises(MediaError, match="too long: 3.0 s, limit 1 s"):
        probe_video(data, "mp4", 1, 10_000)


MATRICES = [(a, b, c, d) for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1) for d in (-1, 0, 1)]
MATRICES = [m for m in MATRICES if m[0] * m[3] - m[1] * m[2] and abs(m[0]) + abs(m[1]) == 1 == abs(m[2]) + abs(m[3])]


@pytest.mark.parametrize("matrix", MATRICES)
def test_frames_are_turned_and_mirrored_as_the_display_matrix_says(matrix):
    """The expected picture comes from moving every pixel as FFmpeg's documentation of the matrix says."""
    a, b, c, d = matrix
    frame = av.VideoFrame.from_ndarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8))
    plain = media_stream.upright_frame(frame, VideoReformatter())
    turned = media_stream.turned(plain, media_stream.turn_of(tuple(65536 * value for value in (a, b, 0, c, d))))
    y, x = np.mgrid[0:16, 0:32]
    column, row = a * x + c * y, b * x + d * y
    expected = np.zeros_like(turned)
    expected[row - row.min(), column - column.min()] = plain
    np.testing.assert_array_equal(turned, expected)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg command")
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_a_rotated_video_is_shown_as_ffmpeg_shows_it(tmp_path, rotation):
    data = encoded_video("mpeg4", "mp4", 64, 48, 6, 10, rotation=rotation)
    (tmp_path / "a.mp4").write_bytes(data)
    command = ["ffmpeg", "-v", "error", "-i", "a.mp4", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    height, width = (48, 64) if rotation % 180 == 0 else (64, 48)
    expected = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
    frames = all_frames(data)
    assert frames.shape == expected.shape
    assert abs(frames.astype(int) - expected).mean() < 3


def test_frames_before_the_start_of_an_edit_list_are_not_shown():
    whole = encoded_video("mpeg4", "mp4", 64, 48, 20, 10)
    data = encoded_video("mpeg4", "mp4", 64, 48, 20, 10, starts_at=-5)
    times = probe_video(data, "mp4", 60, 10**6)
    assert times.seconds == pytest.approx([number / 10 for number in range(15)])
    assert times.duration == pytest.approx(1.5)
    shown, stored = all_frames(data).astype(int), all_frames(whole).astype(int)
    differences = abs(shown[:, None] - stored[None]).mean((2, 3, 4))
    assert differences.argmin(axis=1).tolist() == list(range(5, 20))


def test_a_cover_picture_is_no_video():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        cover = container.add_stream("png", rate=1)
        cover.width = cover.height = 16
        cover.pix_fmt = "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))
        picture.pts, picture.time_base = 0, Fraction(1, 1)
        container.mux(cover.encode(picture))
        container.mux(cover.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    with pytest.raises(MediaError, match="no video in the file"):
        probe_video(buffer.getvalue(), "mp4", 60, 10**6)


def decode_a_video() -> None:
    assert len(decode_frames(corpus.mp4_bytes(0), "mp4", None, (0, 3), 28, 28)) == 2


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_worker_forked_after_a_video_was_decoded_decodes_too():
    decode_a_video()
    worker = multiprocessing.get_context("fork").Process(target=decode_a_video)
    worker.start()
    worker.join(30)
    worker.kill()
    assert worker.exitcode == 0
