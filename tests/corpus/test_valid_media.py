"""What the builder accepts the loader reads: random valid media go through both."""

import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_anyexperts.corpus.corpus import Limits
from megatron_anyexperts.corpus.facts import Facts
from megatron_anyexperts.corpus.probe import probe
from megatron_anyexperts.corpus.sample import Media
from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.cookers import cook
from megatron_anyexperts.data.encode import DocumentEncoder
from megatron_anyexperts.data.vocabulary import Vocabulary
from megatron_anyexperts.media import MediaShape
from tests.corpus.media import encoded_audio, encoded_video, tone
from tests.feed import corpus

FEW = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
ANY_LENGTH = Limits(min_seconds=0.001, min_side=1)
TEXT_FIELD = {"image": "caption", "audio": "transcript", "video": "caption"}

AUDIO = [
    ("pcm_s16le", "wav"), ("pcm_u8", "wav"), ("pcm_s24le", "wav"), ("pcm_s32le", "wav"), ("pcm_s64le", "wav"),
    ("pcm_f32le", "wav"), ("pcm_f64le", "wav"), ("pcm_mulaw", "wav"), ("adpcm_ms", "wav"), ("flac", "flac"),
    ("flac", "ogg"), ("mp3", "mp3"), ("aac", "adts"), ("aac", "ipod"), ("alac", "ipod"), ("aac", "mov"),
    ("ac3", "matroska"), ("libopus", "ogg"), ("libopus", "webm"), ("pcm_s16le", "avi"),
]  # fmt: skip
VIDEO = [
    ("mpeg4", "mp4"), ("mpeg4", "avi"), ("libx264", "mp4"), ("libx264", "mov"), ("libx264", "matroska"),
    ("libx264", "avi"), ("libvpx", "webm"), ("libvpx-vp9", "webm"), ("mjpeg", "avi"), ("ffv1", "matroska"),
    ("mpeg2video", "matroska"), ("msmpeg4", "avi"),
]  # fmt: skip
EVERY_RATE = ("pcm_", "flac", "alac", "adpcm")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    vocabulary = Vocabulary(corpus.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    config = DataConfig(data_image_max_patches=64, data_video_max_patches=64)
    return DocumentEncoder(config, MediaShape(patch_size=14), vocabulary, 2048)


def accepted_and_read(encoder: DocumentEncoder, kind: str, data: bytes) -> Facts:
    """What the builder says about a file that the loader read as well."""
    facts = probe(Media(kind, data), ANY_LENGTH)
    crude = {"json": json.dumps({TEXT_FIELD[kind]: "x"}).encode(), facts.extension: data}
    [planned] = encoder.plan(cook(f"{kind}_text", crude | {"__key__": "k", "__restore_key__": ()}))
    decoded = encoder.decode(planned)
    assert len(decoded.frames) + len(decoded.clips) == 1
    assert all(np.isfinite(part).all() for part in (*decoded.frames, *decoded.clips))
    return facts


@st.composite
def audio(draw) -> tuple[str, str, int, str, float]:
    codec, container = draw(st.sampled_from(AUDIO))
    rates = [8000, 11_025, 22_050, 44_100, 48_000] + [7350, 96_000] * (codec in ("pcm_s16le", "flac"))
    layouts = ["mono", "stereo"] + ["5.1"] * (codec.startswith(("pcm_s", "flac", "aac", "ac3")) and container != "avi")
    rate = draw(st.sampled_from(rates if codec.startswith(EVERY_RATE) else [48_000]))
    return codec, container, rate, draw(st.sampled_from(layouts)), draw(st.floats(0.01, 1.5))


@FEW
@given(made=audio())
def test_valid_sound_is_accepted_and_read(encoder, made):
    codec, container, rate, layout, seconds = made
    data = encoded_audio(codec, container, rate, layout, tone(seconds, rate, layout))
    # Codecs add up to a few frames of their own at both ends; ADPCM fills its last block.
    added = 0.15 + (2048 / rate if codec.startswith("adpcm") else 0)
    assert accepted_and_read(encoder, "audio", data).seconds == pytest.approx(seconds, abs=added)


@st.composite
def video(draw) -> tuple[str, str, int, int, int, float, int, int]:
    codec, container = draw(st.sampled_from(VIDEO))
    width, height = (2 * draw(st.integers(8, 80)) for _ in range(2))
    rates = [24, 25, 60] + [1, 5, 10, 29.97] * (codec != "mpeg2video")
    rate, frames = draw(st.sampled_from(rates)), draw(st.integers(1, 40))
    rotation = draw(st.sampled_from([0, 90, 180, 270])) if container in ("mp4", "mov") else 0
    starts_at = -draw(st.integers(0, frames - 1)) if (codec, container) == ("mpeg4", "mp4") else 0
    return codec, container, width, height, frames, rate, rotation, starts_at


@FEW
@given(made=video())
def test_valid_video_is_accepted_and_read(encoder, made):
    _, _, width, height, frames, rate, rotation, starts_at = made
    facts = accepted_and_read(encoder, "video", encoded_video(*made))
    assert (facts.width, facts.height) == ((height, width) if rotation % 180 else (width, height))
    assert facts.frames == frames + starts_at
    assert facts.seconds == pytest.approx(facts.frames / rate, abs=1.01 / rate + 0.002)


IMAGES = {
    "PNG": ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"],
    "JPEG": ["RGB", "L", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["P", "L"],
    "BMP": ["RGB", "L", "P", "1"],
    "TIFF": ["RGB", "RGBA", "L", "CMYK", "LAB", "I;16", "I", "F", "1"],
}


def picture(mode: str, size: tuple[int, int]) -> Image.Image:
    grey = Image.linear_gradient("L").resize(size)
    if mode == "LAB":
        return Image.merge("LAB", (grey, grey, grey))
    if mode.startswith("I"):
        return grey.convert("I").convert(mode)
    return (grey if mode in ("L", "LA", "F", "1") else grey.convert("RGB")).convert(mode)


@FEW
@given(data=st.data())
def test_valid_pictures_are_accepted_and_read(encoder, data):
    form = data.draw(st.sampled_from(list(IMAGES)))
    mode, size = data.draw(st.sampled_from(IMAGES[form])), data.draw(st.tuples(*[st.integers(1, 300)] * 2))
    orientation = data.draw(st.integers(1, 8)) if form in ("PNG", "JPEG", "WEBP", "TIFF") else 1
    assume(max(size) <= ANY_LENGTH.max_aspect * min(size))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture(mode, size).save(buffer, form, **({"exif": exif} if orientation > 1 else {}))
    facts = accepted_and_read(encoder, "image", buffer.getvalue())
    assert (facts.width, facts.height) == (size[::-1] if orientation > 4 else size)


def test_builder_and_loader_share_their_limits():
    limits, config = Limits(), DataConfig()
    assert limits.max_pixels == config.data_image_max_pixels
    assert limits.max_audio_seconds == config.data_audio_max_seconds
    assert limits.max_video_seconds == config.data_video_max_seconds
