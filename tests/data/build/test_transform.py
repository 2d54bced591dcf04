"""Media change only as asked, and deterministically."""

import io

import pytest
from PIL import Image

from megatron_anyexperts.data.build.corpus import Limits, Transform
from megatron_anyexperts.data.build.probe import probe
from megatron_anyexperts.data.build.sample import Media, Rejected, Sample
from megatron_anyexperts.data.build.transform import transform
from tests.data.build.raw import mp4, png, wav


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
