"""Media change only as asked, and deterministically."""

import io

import numpy as np
import pytest
from PIL import Image

from megatron_anyexperts.corpus.corpus import Limits, Transform
from megatron_anyexperts.corpus.near import image_signature
from megatron_anyexperts.corpus.probe import probe
from megatron_anyexperts.corpus.sample import Media, Rejected, Sample
from megatron_anyexperts.corpus.transform import transform
from megatron_anyexperts.data.media_stream import decode_frames, probe_video
from tests.corpus.media import encoded_video, mp3_that_changes_its_channels
from tests.corpus.raw import mp4, png, wav


def changed(kind: str, data: bytes, **options):
    """Facts as reported and as probed after a change, and the bytes."""
    sample = Sample(kind, {}, [Media(kind, data)])
    result, [fact] = transform(sample, [probe(sample.media[0], Limits())], Transform(**options), Limits())
    again, _ = transform(sample, [probe(sample.media[0], Limits())], Transform(**options), Limits())
    assert again.media[0].data == result.media[0].data
    return fact, probe(result.media[0], Limits()), result.media[0].data


def test_nothing_changes_unless_asked():
    for kind, data in {"image": png(1), "audio": wav(1), "video": mp4(1)}.items():
        assert changed(kind, data)[2] is data
        assert changed(kind, data, image_max_side=64, video_max_side=64)[2] is data


def test_large_images_shrink_and_keep_aspect_and_transparency():
    buffer = io.BytesIO()
    Image.new("RGBA", (200, 100), (255, 0, 0, 0)).save(buffer, "PNG")
    fact, probed, data = changed("image", buffer.getvalue(), image_max_side=50)
    assert fact == probed and (fact.width, fact.height) == (50, 25)
    assert Image.open(io.BytesIO(data)).getpixel((10, 10))[3] == 0
    fact, probed, data = changed("image", buffer.getvalue(), image_max_side=50, image_format="jpg")
    assert fact == probed and fact.extension == "jpg"
    assert min(Image.open(io.BytesIO(data)).getpixel((10, 10))) > 250


def test_sound_is_resampled_to_flac():
    fact, probed, _ = changed("audio", wav(1, seconds=0.5, rate=16000), audio_sample_rate=8000)
    assert fact.extension == probed.extension == "flac"
    assert probed.seconds == pytest.approx(0.5, abs=0.01)


def test_large_videos_shrink_and_keep_their_frames():
    fact, probed, _ = changed("video", mp4(1, width=64, height=32), video_max_side=32)
    assert (probed.width, probed.height, probed.frames) == (32, 16, 5) == (fact.width, fact.height, fact.frames)


def test_what_cannot_be_converted_is_rejected():
    sample = Sample("image", {}, [Media("image", png(1))])
    facts = [probe(sample.media[0], Limits())]
    sample.media[0].data = b"damaged"
    with pytest.raises(Rejected, match="unreadable image"):
        transform(sample, facts, Transform(image_max_side=8), Limits())


def stored(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_shrunk_pictures_keep_their_camera_orientation(form):
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed turned clockwise: left becomes top
    picture = Image.new("RGB", (200, 100), "black")
    picture.paste("white", (0, 0, 100, 100))
    fact, probed, data = changed("image", stored(picture, form, exif=exif), image_max_side=50)
    assert fact == probed and (fact.width, fact.height) == (25, 50)
    image = Image.open(io.BytesIO(data))
    assert image.getexif().get(0x0112, 1) == 1
    pixels = np.asarray(image.convert("L"))
    assert pixels[:20].min() > 240 and pixels[30:].max() < 15


def test_shrunk_pictures_of_16_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 200 * 200).reshape(200, 200)
    data = changed("image", stored(Image.fromarray(ramp.astype(np.uint16)), "PNG"), image_max_side=50)[2]
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(float)
    assert abs(pixels.mean() - 127.5) < 2 and pixels.max() - pixels.min() > 245


def test_pictures_of_16_bits_have_perceptual_hashes_of_their_own():
    def signature(pixels: np.ndarray) -> int:
        sample = Sample("image", {}, [Media("image", stored(Image.fromarray(pixels), "PNG"))])
        return image_signature(sample, 10**6)

    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 40)).repeat(8, 1).repeat(8, 2)
    wide = [signature((pixels * 257).astype(np.uint16)) for pixels in noise]
    assert wide == [signature(pixels.astype(np.uint8)) for pixels in noise]
    assert (wide[0] ^ wide[1]).bit_count() > 10


def test_a_shrunk_video_is_upright_and_keeps_the_times_of_its_frames():
    data = encoded_video("mpeg4", "mp4", 64, 32, 12, 8, rotation=90, starts_at=-4)
    fact, probed, smaller = changed("video", data, video_max_side=32)
    assert fact == probed and (fact.width, fact.height, fact.frames) == (16, 32, 8)
    before, after = (probe_video(file, "mp4", 60, 10**6) for file in (data, smaller))
    assert after.seconds == pytest.approx(before.seconds, abs=0.002)
    shown, expected = (
        decode_frames(file, "mp4", tuple(times.ticks), tuple(range(8)), 32, 16).astype(int)
        for file, times in ((smaller, after), (data, before))
    )
    assert abs(shown - expected).mean() < 12


def test_a_sound_that_changes_its_channels_is_resampled_whole():
    fact, probed, _ = changed("audio", mp3_that_changes_its_channels(), audio_sample_rate=16_000)
    assert fact == probed and fact.seconds == pytest.approx(2.0, abs=0.15)
